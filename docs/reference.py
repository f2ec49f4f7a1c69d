"""Build the reference of the public API from its docstrings: `python docs/reference.py build/docs`.

Public is what a script, a recipe or a notebook imports: the modules listed here. Others may change without notice.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pdoc
from pydantic import BaseModel

PUBLIC = (
    "gemma_xla",
    "gemma_xla.chips",
    "gemma_xla.config",
    "gemma_xla.config_data",
    "gemma_xla.config_file",
    "gemma_xla.data.documents",
    "gemma_xla.data.loader",
    "gemma_xla.data.packing",
    "gemma_xla.data.tokenizer",
    "gemma_xla.errors",
    "gemma_xla.flops",
    "gemma_xla.hf",
    "gemma_xla.infer",
    "gemma_xla.infer.sampling",
    "gemma_xla.model.attention",
    "gemma_xla.model.config",
    "gemma_xla.model.gemma",
    "gemma_xla.model.lora",
    "gemma_xla.plan.answer",
    "gemma_xla.plan.result",
    "gemma_xla.plan.setup",
    "gemma_xla.plan.slices",
    "gemma_xla.sharding",
    "gemma_xla.train",
    "gemma_xla.train.memory",
    "gemma_xla.weights",
)


def load(name: str) -> ModuleType:
    """Import a module so that pdoc sees all of it: names that load on demand, and comments on keys of the config."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        setattr(module, public, getattr(module, public))
    for value in [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name]:
        if issubclass(value, BaseModel):
            for key, comment in _comments(value).items():
                value.model_fields[key].description = comment
        elif issubclass(value, tuple):
            # A named tuple's own constructor does not know the names that its module has imported.
            value.__new__.__annotations__ = get_type_hints(value)
    return module


def _comments(section: type[BaseModel]) -> dict[str, str]:
    """The comment above each field of a section."""
    lines, _ = inspect.getsourcelines(section)
    found = {}
    for node in ast.parse("".join(lines)).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above: list[str] = []
            line = node.lineno - 2
            while lines[line].strip().startswith("#"):
                above.insert(0, lines[line].strip().removeprefix("#").strip())
                line -= 1
            if above:
                found[node.target.id] = " ".join(above)
    return found


def build(out: Path, search: bool = True) -> None:
    """Write the reference as a folder of HTML, with an index to search or without."""
    for name in PUBLIC:
        load(name)
    pdoc.render.configure(docformat="google", footer_text="gemma_xla", search=search)
    pdoc.pdoc(*PUBLIC, output_directory=out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    # It is not in the reference, and takes seconds to load.
    os.environ.setdefault("USE_TORCH_XLA", "0")
    build(parser.parse_args().out)
