"""Endurance: a run that is interrupted again and again must end with the bits of one that was left alone.

    python benchmarks/soak.py
    python benchmarks/soak.py --plain --steps 600 --interruptions 6 --seed 1 --folder runs/soak-1

First the run as it is, then the same run killed, stopped, out of disk space and with damaged checkpoints, by a drawn
plan. Exits with 1 when anything differs, more is lost than was under way, or memory, file handles or threads grow.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from random import Random

from soak_figures import Figures, differing_bits, growth
from soak_interruptions import INTERRUPTIONS, Ended
from soak_run import Failed, Sample, SoakedRun, Start, launch
from tqdm import tqdm

from gemma_xla import interrupts
from gemma_xla.checkpoint import complete
from gemma_xla.config import RunConfig
from gemma_xla.config_file import load_config
from gemma_xla.errors import UserError
from gemma_xla.storage import remove_tree

QUICKSTART = Path(__file__).parents[1] / "recipes/configs/quickstart.yaml"
# An hour of it on two cores.
STEPS = 4500
SETTINGS = ["checkpoint.every=20"]


def main(argv: list[str] | None = None, start: Start = launch) -> int:
    """Soak a run; return the exit code. ``start`` starts its processes."""
    args = _arguments(argv)
    given = [f"train.steps={args.steps}", *SETTINGS, *args.set]
    config = load_config(args.config, given)
    draw = Random(args.seed)
    plan = make_plan(config.train.steps, config.checkpoint.every, args.interruptions, draw)
    _check(config, args.folder)
    args.folder.mkdir(parents=True)
    if args.plain:
        start = partial(launch, USE_TORCH_XLA="0")
    arguments = ["--config", str(args.config.absolute()), *(part for one in given for part in ("--set", one))]
    try:
        figures = soak(start, arguments, args.folder.absolute(), plan, config, draw)
    except Failed as failure:
        print(f"failed: {failure}")
        return 1
    print(figures.table())
    problems = figures.problems()
    for problem in problems:
        print(f"failed: {problem}")
    return 1 if problems else 0


def make_plan(steps: int, every: int, interruptions: int, draw: Random) -> list[tuple[str, int]]:
    """Draw what happens, and after which step: all kinds about equally often.

    Raises:
        UserError: there are too few steps.
    """
    # The last part is left alone.
    room = steps // (interruptions + 1)
    # After one checkpoint; before two more, because of a full disk one may fail and one must succeed.
    if not every or room <= 3 * every:
        raise UserError(
            f"{steps} steps with a checkpoint every {every} have no room for {interruptions} interruptions: each takes "
            "more than 3 checkpoints; set --interruptions, --steps or --set checkpoint.every=..."
        )
    kinds: list[str] = []
    while len(kinds) < interruptions:
        kinds += draw.sample(list(INTERRUPTIONS), len(INTERRUPTIONS))
    targets = [number * room + draw.randrange(every, room - 2 * every) for number in range(interruptions)]
    return list(zip(kinds[:interruptions], targets, strict=True))


def soak(
    start: Start, arguments: list[str], folder: Path, plan: list[tuple[str, int]], config: RunConfig, draw: Random
) -> Figures:
    """Take both runs to their ends, one after the other, and compare them.

    Raises:
        Failed: one of them did what it never may.
    """
    figures = Figures(planned=len(plan))
    runs = []
    for name in ("reference", "interrupted"):
        with (
            tqdm(total=config.train.steps, desc=name, unit="step", mininterval=1, disable=None) as bar,
            SoakedRun(start, arguments, folder / name, config.checkpoint.every, bar) as run,
        ):
            run.start()
            if runs:
                disturb(run, plan, draw, figures)
            run.wait_until_done()
        runs.append(run)
    figures.differing, figures.compared = differing_bits(*(run.folder for run in runs))
    _judge(figures, runs[0].samples[0], max(runs[1].samples, key=len))
    return figures


def _judge(figures: Figures, whole: list[Sample], longest: list[Sample]) -> None:
    """Note what grew in a process that was left alone, and what the longest of the others leaked.

    Memory counts in the first alone: in the others, the first evaluation may come late.
    """
    found, other = growth(whole), growth(longest) or (0.0, 0, 0)
    if found is None:
        raise Failed("there are too few steps to see what grows; set --steps")
    figures.memory, *leaked = found
    figures.handles, figures.threads = map(max, zip(leaked, other[1:], strict=True))


def disturb(run: SoakedRun, plan: list[tuple[str, int]], draw: Random, figures: Figures) -> None:
    """Carry out a plan on a run that has been started."""
    for kind, target in plan:
        # Two, so that the newest may be damaged.
        run.wait_until(lambda target=target: run.step >= target and len(complete(run.checkpoints)) > 1)
        ended = INTERRUPTIONS[kind](run, draw)
        figures.survived[kind] += 1
        if ended is None:
            tqdm.write(f"step {run.step}: {kind}: the process went on")
        else:
            figures.lost.append(resume(run, kind, ended))
            tqdm.write(f"step {ended.reported}: {kind}: {figures.lost[-1]} steps lost")


def resume(run: SoakedRun, kind: str, ended: Ended) -> int:
    """Start the next process after one has ended; return the number of steps lost.

    Raises:
        Failed: it continues from another step than it must.
    """
    step = run.resume(*ended.said)
    lost = ended.reported - step
    if step != ended.left or lost > ended.allowed:
        raise Failed(
            f"{run.log}: {kind} after step {ended.reported}: the run continues from step {step}; the newest whole "
            f"checkpoint is of step {ended.left}, and at most {ended.allowed} steps may be lost"
        )
    for damaged in run.checkpoints.glob("damaged-*"):
        remove_tree(damaged)
    return lost


def _check(config: RunConfig, folder: Path) -> None:
    if config.checkpoint.keep_last < 2:
        raise UserError(
            f"checkpoint.keep_last is {config.checkpoint.keep_last}; when the newest is damaged, it takes 2"
        )
    if folder.exists():
        raise UserError(f"--folder {folder}: it is there already; delete it or choose another")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="the run (default: the quickstart)")
    parser.add_argument("--steps", type=int, default=STEPS, help="train.steps (default: %(default)s)")
    parser.add_argument("--interruptions", type=int, default=30, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws what happens when")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for the recipe")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="new; keeps everything, logs included")
    parser.add_argument("--plain", action="store_true", help="without torch_xla")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        with interrupts.handled():
            sys.exit(main())
    except (UserError, interrupts.Interrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
