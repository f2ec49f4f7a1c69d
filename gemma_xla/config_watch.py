"""The part of the config that says how a run is watched while nobody looks (docs/operations.md)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from gemma_xla.config_base import NonNegativeFloat, Section

# Up to eleven days.
Seconds = Annotated[float, Field(gt=0, le=1e6)]


class WatchSection(Section):
    """What a run that is left alone tells, and when it gives up. It changes nothing that is computed."""

    # Seconds between two lines about steps in a log (a terminal shows a bar instead), and until a line says what is
    # being waited for.
    heartbeat: Seconds = 60.0
    # A step that takes so many times the usual time, the median of the latest, hangs: the stacks of all threads are
    # written and the process ends with exit code 4. 0: nothing ever does.
    hang_factor: NonNegativeFloat = 20.0
    # No step hangs before so many seconds have passed.
    hang_floor: Seconds = 600.0
    # What has no usual time hangs after so many seconds without progress: preparing, the first steps, one that
    # compiles, evaluating, saving, exporting.
    hang_limit: Seconds = 7200.0
    # A loss or gradient norm that stands out from the latest ones by so many standard deviations is reported. 0: none.
    spike: NonNegativeFloat = 10.0

    @model_validator(mode="after")
    def _patience_grows(self) -> WatchSection:
        if 0 < self.hang_factor < 2:
            raise ValueError(f"hang_factor is {self.hang_factor:g}; it must be 0, which turns it off, or at least 2")
        if 0 < self.spike < 3:
            raise ValueError(f"spike is {self.spike:g}; it must be 0, which turns it off, or at least 3")
        if self.hang_limit < self.hang_floor:
            raise ValueError(
                f"hang_limit is {self.hang_limit:g} and hang_floor {self.hang_floor:g}; it must not be less"
            )
        return self
