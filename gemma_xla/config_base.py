"""What every section of the config is, and the kinds of values it holds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Sizes and counts that a 32-bit integer holds, as the devices' own do.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
# What a float32 holds.
PositiveFloat = Annotated[float, Field(gt=0, lt=3e38)]
NonNegativeFloat = Annotated[float, Field(ge=0, lt=3e38)]
# A name or path: not empty, and without the one character that no path has.
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config: unknown keys, wrong types and NaN are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
