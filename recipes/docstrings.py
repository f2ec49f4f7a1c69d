"""Make a small data set to fine-tune on from Python's own standard library: a function's signature, and the first line
of its docstring.

    python recipes/docstrings.py runs/docstrings

Writes train.jsonl and eval.jsonl, a `{"prompt": ..., "completion": ...}` per line. A module is in one of them alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Characters; longer ones are left out.
LONGEST_PROMPT, LONGEST_COMPLETION = 100, 80
# One module in so many is held out.
HELD_OUT = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    examples = read(Path(sysconfig.get_path("stdlib")))
    for name, pairs in examples.items():
        path = out / f"{name}.jsonl"
        lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{path}: {len(pairs):,} examples")


def read(library: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the pairs to train and to evaluate on; no prompt is there twice."""
    examples: dict[str, list[tuple[str, str]]] = {"train": [], "eval": []}
    seen = set()
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"} & set(module.parts):
            continue
        held_out = hashlib.sha256(str(module).encode()).digest()[0] % HELD_OUT == 0
        for prompt, completion in pairs_in(path):
            if prompt not in seen:
                seen.add(prompt)
                examples["eval" if held_out else "train"].append((prompt, completion))
    return examples


def pairs_in(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each documented function of a file: its signature as a prompt, and its docstring's first line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        print(f"{path} is left out: {error}", file=sys.stderr)
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
            prompt = f'def {node.name}({ast.unparse(node.args)}):\n    """'
            completion = docstring.strip().split("\n")[0].rstrip() + '"""'
            if len(prompt) <= LONGEST_PROMPT and 10 <= len(completion) <= LONGEST_COMPLETION:
                yield prompt, completion


if __name__ == "__main__":
    main()
