"""What a compiled step takes of a chip's memory, from the compiler's own account."""

from __future__ import annotations

import re
from typing import Any

from gemma_xla.plan.result import Buffer, HbmUse

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT]?)"


def memory_use(compiled: dict[str, Any], description: dict[str, Any], available: int) -> HbmUse:
    """
    Args:
        compiled: what `gemma_xla.plan.compile.compile_graph` returned.
        description: of the graph that was compiled.
        available: bytes that programs may use.
    """
    held = dict.fromkeys(("parameters", "optimizer", "gradients", "batch", "scalars"), 0)
    for argument in description["arguments"].values():
        held[argument["kind"]] += argument["shard_bytes"]
    if "out_of_memory" in compiled:
        return _overfull(compiled["out_of_memory"], held, available)
    memory = compiled["memory"]
    # At the worst moment, arguments and new results included. The sum of all temporaries, which the compiler states
    # too, counts a place that several have one after the other more than once.
    temporaries = memory["peak"] - memory["argument"]
    state = held["parameters"] + held["optimizer"] + held["gradients"]
    return HbmUse(
        available=available,
        parameters=held["parameters"],
        optimizer=held["optimizer"],
        gradients=held["gradients"],
        # And what tiles add to all arguments.
        batch=max(0, memory["argument"] - state),
        temporaries=temporaries,
        program=memory["generated_code"],
        used=memory["peak"] + memory["generated_code"],
    )


def _overfull(account: str, held: dict[str, int], available: int) -> HbmUse:
    """From the text in which the compiler says that, and why, a program does not fit.

    Sometimes it counts the arguments, sometimes it has not come so far: ours take the place of those it names.
    """
    counted = re.search(rf"^\s*arguments\s+{_SIZE}", account, re.MULTILINE)
    used = _bytes(re.search(rf"Used {_SIZE} of", account)) - (_bytes(counted) if counted else 0)
    arguments = sum(held.values())
    return HbmUse(
        available=available,
        parameters=held["parameters"],
        optimizer=held["optimizer"],
        gradients=held["gradients"],
        batch=held["batch"] + held["scalars"],
        temporaries=used,
        program=0,
        used=used + arguments,
        largest=_largest(account),
    )


def _largest(account: str) -> list[Buffer]:
    """The compiler's list of the largest allocations, equal ones together."""
    found: dict[tuple[int, str, str], int] = {}
    for block in re.split(r"\n\s*\d+\. Size: ", account)[1:]:
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", block)
        label = re.search(r"XLA label: \S+ = ([\w-]+)", block)
        operator = re.search(r'op_name="([^"]*)"', block)
        source = ", ".join(part for part in (operator and operator[1], label and label[1]) if part)
        key = (_bytes(re.match(_SIZE, block)), shape[1] if shape else "", source)
        found[key] = found.get(key, 0) + 1
    buffers = [
        Buffer(num_bytes, shape, f"{source} (x {count})" if count > 1 else source)
        for (num_bytes, shape, source), count in found.items()
    ]
    return sorted(buffers, key=lambda buffer: -buffer.num_bytes)


def _bytes(found: re.Match[str]) -> int:
    return round(float(found[1]) * _UNITS[found[2]])
