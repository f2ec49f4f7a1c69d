"""How far a run is: a bar on a terminal, and in a log a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

from tqdm import tqdm


class Progress:
    """Shows the steps of a run. A log gets its lines at once, and none is ever written over."""

    def __init__(
        self, total: int, start: int, enabled: bool, heartbeat: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            total: steps of the run.
            start: steps already taken.
            enabled: whether anything is shown at all.
            heartbeat: seconds between two lines of a log; at first they come faster.
        """
        self._total, self._heartbeat, self._clock = total, heartbeat, clock
        self._enabled = enabled
        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=start, unit="step", disable=not (enabled and on_terminal), dynamic_ncols=True
        )
        self._began = self._told = clock()
        # The first step seen, and when it was done: it has compiled, so it does not say how long the others take.
        self._first: tuple[int, float] | None = None

    def advance(self, record: dict[str, float]) -> None:
        """A step is done; ``record`` holds its figures."""
        now, step = self._clock(), int(record["step"])
        self._first = self._first or (step, now)
        self.bar.set_postfix_str(_figures(record), refresh=False)
        self.bar.update()
        # After 1, 2, 4 ... seconds until that is more than a heartbeat.
        due = now - self._told >= min(self._heartbeat, self._told - self._began)
        if due or step == self._total:
            self._told = now
            if self._enabled and self.bar.disable:
                left = self._left(step, now)
                self.say(f"step {step}/{self._total}: {_figures(record)}" + (f", {left} left" if left else ""))

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self._enabled:
            return
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()

    def _left(self, step: int, now: float) -> timedelta | None:
        """The time to the last step, if the rest goes as fast as so far, evaluations and checkpoints included."""
        first, at = self._first
        if step == first:
            return None
        return timedelta(seconds=round((now - at) / (step - first) * (self._total - step)))


def _figures(record: dict[str, float]) -> str:
    return (
        f"loss {record['loss']:.3f}, {record['tokens_per_second_per_chip']:,.0f} tokens/s/chip, "
        f"MFU {record['mfu']:.1%}, {record['step_time']:.2f} s/step, {record['compilations']:.0f} compiled"
    )
