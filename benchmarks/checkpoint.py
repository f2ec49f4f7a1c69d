"""What a checkpoint costs a run: the step after a save, and the pause before it, beside the other steps.

    python benchmarks/checkpoint.py                 # on four simulated XLA devices
    python benchmarks/checkpoint.py --devices 0     # in plain PyTorch

Each round is a run of the quickstart's model in a process of its own, with a save every few steps. The pause is what
`Saver.save` takes before training goes on: the copy from the devices to the host.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gemma_xla.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
WARMUP = 3


def measure(folder: Path, args: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """Seconds of ordinary steps, of steps after a save, and of these with the pause before them."""
    config = ROOT / "recipes" / "configs" / "quickstart.yaml"
    overrides = [
        *(f"output_dir={folder}", f"train.steps={args.steps}", f"checkpoint.every={args.every}", "eval.every=0"),
        *("data.eval_fraction=0", "export.at_end=false", "log.trackers=[]", f"model.preset={args.preset}"),
        f"mesh.virtual_devices={args.devices or 'null'}",
    ]
    command = [sys.executable, "recipes/pretrain.py", "--config", str(config)]
    command += [part for override in overrides for part in ("--set", override)]
    environment = os.environ | {"USE_TORCH_XLA": "1" if args.devices else "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    plain, after, paused = [], [], []
    for before, record in zip(records[WARMUP:], records[WARMUP + 1 :], strict=False):
        if before["step"] % args.every:
            plain.append(record["step_time"])
        else:
            after.append(record["step_time"])
            paused.append(record["run_time"] - before["run_time"])
    return plain, after, paused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="simulated XLA devices; 0: plain PyTorch")
    parser.add_argument("--preset", default="gemma-tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=6, help="steps between saves")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ratios, pauses = [], []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "run"
            plain, after, paused = measure(folder, args)
            size = sum(f.stat().st_size for f in max((folder / "checkpoints").iterdir()).iterdir())
        usual = statistics.median(plain)
        ratios.append(statistics.median(after) / usual)
        pauses.append(statistics.median(paused) / usual)
        print(
            f"round {number + 1}: step {usual:.3f} s ({len(plain)}), after a save {ratios[-1]:.2f} x ({len(after)}), "
            f"with the pause {pauses[-1]:.2f} x; a checkpoint is {size / 1e6:,.0f} MB",
            flush=True,
        )
    for name, values in (("step after a save / other steps", ratios), ("the same with the pause", pauses)):
        print(f"{name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
