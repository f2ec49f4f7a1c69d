"""What products of 8-bit integers do to a run's loss: one small Gemma, equal weights, equal batches, four precisions.

    python benchmarks/int8_curve.py
    python benchmarks/int8_curve.py --only float32 int8 --seed 1 --folder /tmp/curves

The quickstart's text, Python's standard library, and 500 steps of 1024 tokens in plain PyTorch. Compared are the loss
on held-out text after the last step, and the mean of the last 50 training losses. Interrupted, it goes on where it was
if it has a ``--folder``. Exits with 1 when a run in 8 bits ends more than 1% above float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gemma_xla.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
# How each run differs from the first, which the others are compared with.
RUNS: dict[str, list[str]] = {
    "float32": [],
    "int8": ["train.precision=int8"],
    "int8, stochastic": ["train.precision=int8", "train.int8_rounding=stochastic"],
    "bfloat16": ["train.compute_dtype=bfloat16"],
}
BASELINE = "float32"
# 2.2M parameters; heads x head_dim (128) is not hidden_size.
MODEL = "{hidden_size: 192, intermediate_size: 768, initializer_range: 0.07}"
# Training losses whose mean is compared; and, for the picture, smoothed over.
LAST, SMOOTHED = 50, 25
# How far above float32 a run in 8 bits may end.
ALLOWED = 0.01
# Okabe and Ito's colours, which the colour-blind can tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = dict(zip(RUNS, ("#000000", "#0072B2", "#E69F00", "#009E73"), strict=True))
DASHES = dict(zip(RUNS, ("-", "-", "--", ":"), strict=True))


@dataclass(frozen=True)
class Curve:
    """What one run reported: the losses of its steps, and held-out losses by step."""

    losses: list[float]
    held_out: dict[int, float]

    @property
    def figures(self) -> dict[str, float]:
        """What is compared."""
        return {"held_out": self.held_out[len(self.losses)], "training": statistics.fmean(self.losses[-LAST:])}


def train(name: str, folder: Path, args: argparse.Namespace) -> Curve:
    """Take a run to its end, in a process of its own."""
    overrides = [
        *(f"output_dir={folder}", f"seed={args.seed}", f"model.overrides={MODEL}", f"train.steps={args.steps}"),
        *("data.seq_len=256", "train.batch_size=4", f"eval={{every: {args.every}, batches: 64}}"),
        *(f"checkpoint.every={args.every}", "mesh.virtual_devices=null", "export.at_end=false", "log.trackers=[]"),
        *RUNS[name],
    ]
    command = [sys.executable, "recipes/pretrain.py", "--config", "recipes/configs/quickstart.yaml"]
    command += [part for override in overrides for part in ("--set", override)]
    # Threads that wait by spinning would take from other work.
    environment = os.environ | {"USE_TORCH_XLA": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    records = read_metrics(folder / "metrics.jsonl")
    return Curve(
        [record["loss"] for record in records if "loss" in record],
        {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record},
    )


def differences(curves: dict[str, Curve]) -> dict[str, dict[str, float]]:
    """How far above the baseline each run ends, as a fraction, by what is compared."""
    base = curves[BASELINE].figures
    return {
        name: {what: value / base[what] - 1 for what, value in curve.figures.items()} for name, curve in curves.items()
    }


def report(curves: dict[str, Curve]) -> None:
    print(f"{'':18}{'held-out loss':>14}{'':>9}{f'last {LAST} steps':>15}{'':>9}")
    for name, apart in differences(curves).items():
        ends = curves[name].figures
        print(
            f"{name:18}{ends['held_out']:14.4f}{apart['held_out']:9.2%}{ends['training']:15.4f}{apart['training']:9.2%}"
        )


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Held-out loss of each run, and the smoothed training loss as percent above that of the baseline."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    base = _smooth(curves[BASELINE].losses)
    for name, curve in curves.items():
        style = {"color": COLOURS[name], "linestyle": DASHES[name], "label": name}
        left.plot(*zip(*sorted(curve.held_out.items()), strict=True), marker="o", markersize=3, **style)
        smooth = _smooth(curve.losses)
        percent = [100 * (ours / theirs - 1) for ours, theirs in zip(smooth, base, strict=True)]
        right.plot(range(SMOOTHED, len(smooth) + SMOOTHED), percent, **style)
    right.axhspan(-100 * ALLOWED, 100 * ALLOWED, color="0.92", zorder=0)
    right.set_ylim(-200 * ALLOWED, 200 * ALLOWED)
    left.set(title="Held-out loss", xlabel="step", ylabel="nats per token")
    right.set(title=f"Training loss, mean of {SMOOTHED} steps", xlabel="step", ylabel=f"% above {BASELINE}")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    # On paper of its own: a page may be dark.
    figure.savefig(path, dpi=120, facecolor="white")


def _smooth(losses: list[float]) -> list[float]:
    return [statistics.fmean(losses[end - SMOOTHED : end]) for end in range(SMOOTHED, len(losses) + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="besides float32")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with those that are there")
    parser.add_argument("--plot", type=Path, help="file to draw the curves in, such as docs/figures/int8_curve.png")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    curves = {}
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in RUNS:
            if name != BASELINE and name not in args.only:
                continue
            start = time.perf_counter()
            curves[name] = train(name, (folder / name.replace(", ", "-")).resolve(), args)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    report(curves)
    if args.plot:
        draw(curves, args.plot)
    if args.json:
        args.json.write_text(json.dumps({name: vars(curve) for name, curve in curves.items()}, indent=2) + "\n")
    worst = max((max(apart.values()) for name, apart in differences(curves).items() if "int8" in name), default=0.0)
    print(f"8 bits within {ALLOWED:.0%} of {BASELINE}: {'yes' if worst <= ALLOWED else 'NO'}")
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
