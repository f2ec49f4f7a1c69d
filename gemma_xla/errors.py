"""The exceptions a command answers with one line instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a file or a command.

    The message names the field or file, the value, and the way out. Commands print it and exit with code 2; the
    traceback is only shown under ``--debug``.
    """

    exit_code = 2


class TrainingError(UserError):
    """A run that cannot go on, such as one whose loss is no longer a number."""

    exit_code = 3


class LostProcessError(TrainingError):
    """Another process of the run is gone."""

    exit_code = 5


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the valid name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
