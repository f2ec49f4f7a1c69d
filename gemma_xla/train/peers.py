"""When other processes of a run are gone."""

from __future__ import annotations

import torch.distributed as dist

from gemma_xla.errors import LostProcessError

# What gloo says of a connection, in messages of no type of their own.
_SAYINGS = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused"),
    *("Timed out waiting", "Application timeout", "Socket Timeout", "Read timeout", "Write timeout"),
)


def is_lost(error: BaseException | None) -> bool:
    """Whether an error says that another process no longer answers."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and "gloo" in str(error).lower() and any(s in str(error) for s in _SAYINGS)


def explain(error: BaseException | None) -> None:
    """
    Raises:
        LostProcessError: an error says that another process no longer answers.
    """
    if is_lost(error):
        detail = str(error).strip().partition("\n")[0]
        raise LostProcessError(
            "another process of this run ended or no longer answers; its own output says why. The checkpoints are "
            f"whole: start all of them again to continue from the newest ({detail})"
        ) from error
