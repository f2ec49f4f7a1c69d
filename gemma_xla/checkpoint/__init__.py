"""Checkpoints a run continues from: every tensor in the parts its devices held, and the rest of the state as JSON.

    checkpoints/step-00000100/
        tensors-00000.safetensors   the parts that host 0 held
        tensors-00000.json          which part of which tensor each of them is
        state.json                  step, data position, config, versions; size and checksum of the other files

`state.json` is written last, and at once: a folder without it is not a checkpoint, on a disk as in a bucket. Nothing is
pickled, so nothing is executed on loading, and any other mesh, or plain PyTorch, can read what one mesh wrote.
"""

from gemma_xla.checkpoint.folder import CheckpointError, check, complete, newest, read_state, set_aside, tidy
from gemma_xla.checkpoint.reader import CheckpointReader, open_run
from gemma_xla.checkpoint.saver import Saver

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Saver",
    "check",
    "complete",
    "newest",
    "open_run",
    "read_state",
    "set_aside",
    "tidy",
]
