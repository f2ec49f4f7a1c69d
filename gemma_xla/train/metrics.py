"""What a run reports: computed in one place, shown, written to a file and to accelerate's trackers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_xla.chips import Chip, cost
from gemma_xla.flops import FlopCounter
from gemma_xla.storage import is_local, read_text, reason, replace_text
from gemma_xla.train.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Meter:
    """Turns a step's time and tokens into rates, fractions and dollars."""

    def __init__(self, flops: FlopCounter, chip: Chip, num_chips: int, positions_per_step: int) -> None:
        """
        Args:
            flops: the model's counter.
            chip: whose peak and price count.
            num_chips: how many of them work.
            positions_per_step: rows times sequence length of a step, padding included.
        """
        self.flops = flops
        self.chip = chip
        self.num_chips = num_chips
        self.positions_per_step = positions_per_step
        # Over the whole run, evaluations and checkpoints included, restored on resuming.
        self.seconds = 0.0
        self.tokens = 0

    def step(self, seconds: float, trained_tokens: float, real_tokens: float) -> dict[str, float]:
        """Return the figures of a step that took ``seconds``.

        Args:
            trained_tokens: those that its loss counts.
            real_tokens: all that are not padding.
        """
        self.seconds += seconds
        self.tokens += int(trained_tokens)
        real_fraction = real_tokens / self.positions_per_step
        per_chip = self.positions_per_step / seconds / self.num_chips
        peak = self.chip.peak_flops.value
        mfu = self.flops.mfu(per_chip, peak)
        return {
            "step_time": seconds,
            "run_time": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second_per_chip": per_chip,
            "trained_tokens_per_second_per_chip": trained_tokens / seconds / self.num_chips,
            "real_token_fraction": real_fraction,
            "mfu": mfu,
            "mfu_full_square": self.flops.mfu(per_chip, peak, causal=False),
            "mfu_real_tokens": mfu * real_fraction,
            "dollars": cost(self.chip, self.num_chips, self.seconds / 3600),
        }


class MetricsLog:
    """``metrics.jsonl``, the trackers and the progress of one run; silent on all hosts but the first."""

    def __init__(
        self, path: Path, accelerator: Any, *, total: int, start: int, enabled: bool, heartbeat: float = 60.0
    ) -> None:
        """
        Args:
            path: the file to append to; lines of steps after ``start`` are dropped: they will be taken again.
            accelerator: its trackers receive every record.
            total: steps of the run.
            start: steps already taken.
            enabled: whether this host reports.
            heartbeat: see `Progress`.
        """
        self.path = path
        self.accelerator = accelerator
        self.enabled = enabled
        self.records = [r for r in read_metrics(path) if r["step"] <= start]
        self._written = 0 if enabled else None
        self._failing: set[str] = set()
        self.progress = Progress(total, start, enabled, heartbeat)
        self.say = self.progress.say
        self.attempt("metrics", self._rewrite)

    def write(self, record: dict[str, float]) -> None:
        """Record figures of a step; ``record`` holds "step"."""
        self.records.append(record)
        if self.enabled and is_local(self.path):
            self.attempt("metrics", self._append)
        figures = {k: v for k, v in record.items() if k != "step"}
        self.attempt("trackers", lambda: self.accelerator.log(figures, step=int(record["step"])))

    def flush(self) -> None:
        """Bring the file up to date where lines cannot be added to it one by one."""
        if self.enabled and not is_local(self.path):
            self.attempt("metrics", self._rewrite)

    def advance(self, record: dict[str, float]) -> None:
        """Show a step just finished."""
        self.progress.advance(record)

    def close(self) -> None:
        self.flush()
        self.attempt("trackers", self.accelerator.end_training)
        self.progress.close()

    def _rewrite(self) -> None:
        if self.enabled:
            replace_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))
            self._written = len(self.records)

    def _append(self) -> None:
        if "metrics" in self._failing:
            # The last line may have been cut.
            self._rewrite()
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(r) + "\n" for r in self.records[self._written :]))
        self._written = len(self.records)

    def attempt(self, what: str, action: Callable[[], None]) -> None:
        """A full disk or a tracker's server must not end a run: what could not be written is tried again later."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (each tracker has its own)
            if what not in self._failing:
                self.say(f"warning: {what} could not be written ({reason(error)}); training goes on")
            self._failing.add(what)
            # TensorBoard raises the same one at every step, and each time it would hold on to more.
            error.__traceback__ = None
        else:
            self._failing.discard(what)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file, oldest first; none if it is absent.

    A last line without its end, as a killed process may leave it, does not count.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in read_text(path).split("\n")[:-1]]


def summary(records: list[dict[str, float]]) -> dict[str, float]:
    """What a run ended with: its last losses, and the median of its rates over the steps that compiled nothing."""
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "eval_loss" in r]
    if not steps:
        return {}
    compiled = [0, *(r["compilations"] for r in steps)]
    steady = [r for r, before in zip(steps, compiled, strict=False) if r["compilations"] == before] or steps
    last = steps[-1]
    result = {"steps": last["step"], "tokens": last["tokens"], "loss": last["loss"]}
    if evaluations:
        result |= {name: value for name, value in evaluations[-1].items() if name != "step"}
        result["lowest_eval_loss"] = min(r["eval_loss"] for r in evaluations)
    for name in ("step_time", "tokens_per_second_per_chip", "mfu", "mfu_full_square"):
        result[name] = statistics.median(r[name] for r in steady)
    return {**result, "dollars": last["dollars"], "compilations": last["compilations"]}


def draw(records: list[dict[str, float]], title: str = "") -> Figure:
    """Loss and MFU over steps."""
    from gemma_xla.drawing import BLUE, ORANGE, label, legend, new_figure  # only needed at the end of a run

    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "eval_loss" in r]
    figure, ((loss, mfu),) = new_figure(11, 4, title, columns=2)
    loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], color=BLUE, label="training")
    held_out = [r["eval_loss"] for r in evaluations]
    loss.plot([r["step"] for r in evaluations], held_out, "o-", color=ORANGE, label="held out")
    legend(loss)
    label(loss, x="step", y="loss (nats per token)")
    mfu.plot([r["step"] for r in steps], [100 * r["mfu"] for r in steps], color=BLUE)
    mfu.set_ylim(0, None)
    label(mfu, x="step", y="MFU (%, causal)")
    for axes in (loss, mfu):
        axes.grid(alpha=0.3)
    return figure


def plot(records: list[dict[str, float]], path: Path, title: str) -> None:
    """Draw loss and MFU over steps as a PNG."""
    draw(records, title).savefig(path, dpi=120)
