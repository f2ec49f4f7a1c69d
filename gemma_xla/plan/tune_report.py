"""What tuning found, as text for a terminal."""

from __future__ import annotations

import shlex
import textwrap

from gemma_xla.plan.report import BOUNDS, aligned
from gemma_xla.plan.tune import Row, Tuning, describe, remat
from gemma_xla.plan.units import count, gib

# Of the settings' keys, those that tuning changes.
_TUNED = (
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "train.batch_size_per_device",
    "train.grad_accum",
    "train.remat",
    "train.keep",
)

_WIDTH = 120
_SPEED = ("step s", "MFU", "tok/s/chip", "tok/dollar")


def text(tuning: Tuning, path: str) -> str:
    """A table of what was compiled, what was not and why, and the command that starts the best.

    Args:
        tuning: what was found.
        path: of the config.
    """
    blocks = [_table(tuning), _failures(tuning), _pruned(tuning), _verdict(tuning, path)]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def launch_command(tuning: Tuning, row: Row, path: str) -> str:
    """What to type to start a run with a row's settings."""
    config = tuning.config
    recipe = "recipes/finetune.py" if config.model.init_from else "recipes/pretrain.py"
    keys = row.settings.keys()
    changes = [f"{key}={keys[key]}" for key in _TUNED]
    # Two that would contradict these.
    changes += ["train.batch_size=null"] if config.train.batch_size else []
    changes += ["mesh.virtual_devices=null"] if config.mesh.virtual_devices else []
    if config.hardware.chip not in ("auto", row.plan.chip):
        changes.append(f"hardware.chip={row.plan.chip}")
    sets = [part for change in changes for part in ("--set", change)]
    return shlex.join(["accelerate", "launch", recipe, "--config", path, *sets])


def _table(tuning: Tuning) -> list[str]:
    rows = [row for row in tuning.rows if row.plan is not None]
    if not rows:
        return []
    table = [["slice", "mesh", "batch", "remat", "rows", "GiB per chip", "fits", *_SPEED, ""]]
    for row in rows:
        s, memory = row.settings, row.plan.memory
        over = "yes" if memory.fits else f"{gib(memory.used - memory.available)} over"
        use = f"{gib(memory.used)}/{gib(memory.available)}"
        mark = "best" if row is tuning.winner else "" if row.plan.compiled else "bounds"
        mesh, batch = f"{s.data}x{s.fsdp}x{s.tensor}", f"{s.batch_size_per_device}x{s.grad_accum}"
        table.append([s.topology, mesh, batch, remat(s), f"{s.rows:,}", use, over, *_speed(row), mark])
    notes = (
        "mesh: data x fsdp x tensor; batch: rows per device x micro-batches; rows: sequences per step. MFU is causal. "
        "All times are ESTIMATES, nothing was measured."
    )
    if not all(row.plan.compiled for row in rows):
        notes += f" bounds: {BOUNDS}."
    title = "settings that were tried, the best first"
    return [title, *aligned(table, left=(0, 3, 11), width=_WIDTH), "", *_wrapped(notes)]


def _speed(row: Row) -> list[str]:
    if not row.fits:
        return ["-"] * len(_SPEED)
    figures = row.plan.figures
    speed = [f"{figures.step_seconds:.3f}", f"{figures.mfu:.3f}", f"{figures.tokens_per_second:,.0f}"]
    return [*speed, count(figures.tokens_per_dollar, short=True)]


def _failures(tuning: Tuning) -> list[str]:
    return [line for row in tuning.rows if row.reason for line in _wrapped(f"{describe(row.settings)}: {row.reason}")]


def _pruned(tuning: Tuning) -> list[str]:
    if not tuning.pruned:
        return []
    lines = [f"not compiled: {sum(tuning.pruned.values())}"]
    return lines + [line for why, n in tuning.pruned.most_common() for line in _wrapped(f"- {n} {why}", "    ")]


def _verdict(tuning: Tuning, path: str) -> list[str]:
    winner = tuning.winner
    if winner is None:
        return ["nothing that was compiled fits; try a larger slice"]
    lines = ["the best:", launch_command(tuning, winner, path)]
    if not tuning.keeps_rows(winner):
        base = next(b for b in tuning.base if b.topology == winner.settings.topology)
        lines += ["", *_wrapped(f"A step then has {winner.settings.rows} rows instead of the config's {base.rows}.")]
        if kept := next((row for row in tuning.rows if row.fits and tuning.keeps_rows(row)), None):
            lines += ["the best with the config's own:", launch_command(tuning, kept, path)]
    return lines


def _wrapped(line: str, indent: str = "") -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
