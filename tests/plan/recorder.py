"""Accounts of a training step's graphs: as they are planned, and as a run hands them to the compiler.

An account says how often each operation occurs. An operation is its shape, its name, its attributes (sharding among
them), the computations it calls and, by their digests, its operands: where two accounts are equal, so is what is
computed from what, down to the last constant. Only arguments of equal shape, sharding and donation are not told apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from jaxlib import _jax

from gemma_xla.config import RunConfig
from gemma_xla.model.config import GemmaConfig
from gemma_xla.plan import children
from gemma_xla.sharding import MeshShape

ROOT = Path(__file__).parents[2]
_OPERATION = re.compile(r" +(ROOT )?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")
_SHARDING = re.compile(r", sharding=(\{(?:[^{}]|\{[^{}]*\})*\})")


def planned(config: RunConfig, model: GemmaConfig, folder: Path) -> list[Counter[str]]:
    """Of the graphs that `gemma-xla plan` records, on the config's mesh; ``folder`` is made."""
    mesh = MeshShape(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    question = {
        "config": config.model_dump(),
        "model": asdict(model),
        "mesh": asdict(mesh),
        "rows": config.train.micro_batch_rows(mesh.batch_shards),
        "dtype": config.train.compute_dtype,
        # What a CPU runs: in its place a TPU gets its attention kernel, and memory not filled with zeros.
        "chip": None,
    }
    folder.mkdir()
    (folder / "question").write_text(json.dumps(question))
    progress = children.Progress(sys.stderr)
    children.run("gemma_xla.plan.trace", [folder / "question", folder], "trace", progress, timeout=300)
    return [_planned(path) for path in sorted(folder.glob("*.hlo"))]


def _planned(path: Path) -> Counter[str]:
    said = json.loads(path.with_suffix(".json").read_text())
    shardings = {int(number): argument["sharding"] for number, argument in said["arguments"].items()}
    module = _jax.XlaComputation(path.read_bytes()).get_hlo_module()
    return account(module, {int(number) for number in said["aliases"]}, shardings, said["results"])


def lived(config: Path, overrides: list[str], folder: Path) -> list[Counter[str]]:
    """Of all graphs that a run of the config hands to the compiler, in their order; ``folder`` is made."""
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_large_constants"
    # Compiling quickly: what is compiled is the same.
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"}
    # The console command, which other tests call, leaves it at 0.
    environment["USE_TORCH_XLA"] = "1"
    command = [sys.executable, "-m", "tests.mover", str(config), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [parsed(path.read_text()) for path in sorted(folder.glob("*.before_optimizations.txt"))]


def parsed(text: str) -> Counter[str]:
    """Of a module as XLA writes it: parameters carry their shardings, and the head names those that are donated."""
    donors = re.search(r"buffer_donor=\{(.*?)\}, \w+=", text.splitlines()[0])
    return account(
        _jax.hlo_module_from_text(text), {int(n) for n in re.findall(r"\((\d+),", donors[1] if donors else "")}
    )


def account(
    module: _jax.HloModule, donated: set[int], given: dict[int, str] | None = None, results: list[str] | None = None
) -> Counter[str]:
    """
    Args:
        donated: numbers of the parameters whose memory results may take.
        given: shardings of parameters by number, where they come beside the module. It then says each once more, in an
            operation of its own upon the parameter; that one is passed over.
        results: shardings of the results, where they come beside the module.
    """
    found, digests, computations = Counter(), {}, {}
    shapes, shardings, annotated, before = {}, {}, {}, {}
    for computation, is_entry, operation in _operations(module):
        is_root, name, shape, kind, inside, attributes = operation
        operands = re.sub(r"/\*.*?\*/", "", inside).split(", ") if kind not in ("parameter", "constant", "iota") else []
        source = operands[0] if operands else ""
        shapes[name], shardings[name] = shape, (_SHARDING.search(attributes) or ["", ""])[1]
        equal = None
        if is_entry and kind == "parameter":
            if given and int(inside) in given:
                shardings[name] = annotated[name] = given[int(inside)]
            inside, attributes = f"donated: {int(inside) in donated}", f", sharding={shardings[name]}"
        elif kind == "custom-call" and 'target="Sharding"' in attributes:
            equal = source if annotated.get(source) == shardings[name] else None
        elif kind == "reshape":
            before[name] = source
            # There and back is nothing.
            equal = before.get(source) if shapes.get(before.get(source)) == shape else None
        if equal:
            digests[name] = digests[equal]
        else:
            inside = ", ".join(digests[operand] for operand in operands if operand) or inside
            attributes = re.sub(r"(?<==)[\w.-]+", lambda match: computations.get(match[0], match[0]), attributes)
            text = f"{shape} {kind}({inside}){attributes}"
            digests[name] = hashlib.sha256(text.encode()).hexdigest()[:12]
            found[text] += not (is_entry and is_root)
        if is_root:
            computations[computation] = digests[name]
    # The last is the entry's root, a tuple: in which order the results come makes no difference.
    assert is_entry and is_root and kind == "tuple"
    stated = results or [shardings[operand] for operand in operands]
    found.update(f"{shapes[o]} result({digests[o]}) {s}" for o, s in zip(operands, stated, strict=True))
    return +found


def _operations(module: _jax.HloModule) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """The computation it is in, whether that is the entry, and what it is. Each comes after what it needs."""
    options = _jax.HloPrintOptions.short_parsable()
    options.print_large_constants = True
    for line in module.to_string(options).splitlines()[1:]:
        if line.endswith(" {"):
            is_entry, computation = line.startswith("ENTRY "), line.removeprefix("ENTRY ").split()[0]
        elif line not in ("", "}"):
            yield computation, is_entry, _OPERATION.fullmatch(line).groups()
