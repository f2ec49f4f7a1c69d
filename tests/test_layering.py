"""Policy: which module may import which, what `import gemma_xla` needs, how long functions and files may be."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "gemma_xla"

# From top to bottom: a module imports its own group and those below it, never above. The longest name that fits counts.
ORDER = [
    {"", "__main__", "cli", "notebook"},
    {"plan"},
    {"train"},
    {"temporaries"},
    {"infer"},
    {"weights"},
    {"checkpoint", "hf"},
    {"data"},
    {"xla"},
    {"distributed"},
    {"backend"},
    {"sharding"},
    {"model"},
    {"flops", "chips"},
    {"config_file"},
    {"config"},
    {"config_data", "config_watch"},
    {"config_base"},
    {"tensor_file", "storage", "interrupts", "drawing"},
    {"errors", "model.config", "tpu_flags"},
]
# Only these may use the seam.
SEAM_USERS = {"train", "cli", "notebook", "plan", "infer"}
# Heavy or optional packages, and the only places that may import them.
CONFINED = {"torch_xla": {"xla"}, "jax": {"plan", "xla"}, "jaxlib": {"plan"}, "libtpu": {"plan"}}


def place(module: str) -> int:
    """The group of a module, named without the package (``"model.gemma"``); an unknown one is an error."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for rank, group in enumerate(ORDER):
            if ".".join(parts[:length]) in group:
                return rank
    raise LookupError(f"{PACKAGE}.{module} has no place in the import order: add it to ORDER")


def imports(source: str, module: str, modules: set[str]) -> set[str]:
    """Full names of what ``module`` imports anywhere, functions included; ``from a import b`` gives a.b if a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                raise ValueError(f"{module}, line {node.lineno}: a relative import; write the full name")
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= (names & modules) | ({base} if names - modules else set())
    return found


def violations(module: str, imported: set[str]) -> list[str]:
    """What ``module``, named without the package, imports and should not."""
    wrong, top = [], module.split(".")[0]
    for name in sorted(imported):
        package, _, target = name.partition(".")
        if package in CONFINED and top not in CONFINED[package]:
            wrong.append(f"{module} imports {name}, which only {sorted(CONFINED[package])} may")
        if package != PACKAGE:
            continue
        if place(target) < place(module):
            wrong.append(f"{module} imports {name}, which stands above it")
        if target == "xla" and top not in SEAM_USERS:
            wrong.append(f"{module} imports {name}; only {sorted(SEAM_USERS)} may")
    return wrong


def sources() -> dict[str, str]:
    """Each module's source by its full name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()
GRAPH = {name: imports(source, name, set(SOURCES)) for name, source in SOURCES.items()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    assert violations(module.partition(".")[2], GRAPH[module]) == []


def test_imports_have_no_cycle():
    inside = {name: targets & SOURCES.keys() for name, targets in GRAPH.items()}
    graphlib.TopologicalSorter(inside).prepare()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("**/*.py")), ids=lambda path: path.name)
def test_recipes_leave_the_seam_to_the_library(path):
    imported = imports(path.read_text(encoding="utf-8"), path.name, set(SOURCES))
    assert [name for name in imported if name.split(".")[0] in CONFINED or name == f"{PACKAGE}.xla"] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.gemma", "def f():\n    from gemma_xla.train import step"),
        ("model.gemma", "from gemma_xla import train"),
        ("model.gemma", "from gemma_xla import Gemma"),
        ("infer.engine", "import gemma_xla.train.step"),
        ("flops", "from gemma_xla.model.gemma import Gemma"),
        ("flops", "from gemma_xla.model import config, gemma"),
        ("errors", "from gemma_xla.config import RunConfig"),
        ("xla", "from gemma_xla.train import step"),
        ("data.loader", "from gemma_xla import xla"),
        ("train.step", "import torch_xla.core.xla_model as xm"),
        ("train.step", "if True:\n    import jax.numpy"),
    ],
)
def test_the_check_finds_a_wrong_import(module, source):
    modules = {f"{PACKAGE}.{name}" for name in ("train", "xla", "model.config", "model.gemma")}
    assert len(violations(module, imports(source, module, modules))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flops", "from gemma_xla.model.config import GemmaConfig"),
        ("flops", "from gemma_xla.model import config"),
        ("train.step", "from gemma_xla import xla"),
        ("plan.compile", "import jax"),
        ("xla", "import torch_xla\nfrom gemma_xla.sharding import MeshShape"),
        ("checkpoint", "from gemma_xla.hf import export"),
    ],
)
def test_the_check_lets_a_right_import_pass(module, source):
    modules = {f"{PACKAGE}.{name}" for name in ("train", "xla", "model.config", "model.gemma")}
    assert violations(module, imports(source, module, modules)) == []


def test_a_module_without_a_place_is_an_error():
    with pytest.raises(LookupError, match="gemma_xla.utils has no place"):
        violations("utils", {"gemma_xla.errors"})


IMPORT_WITH_TORCH_ALONE = """
import sys

BLOCKED = {"torch_xla", "transformers", "accelerate", "datasets", "peft", "jax", "pydantic", "yaml"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_import_needs_torch_alone():
    use = "import gemma_xla; gemma_xla.Gemma(gemma_xla.model.config.preset('gemma-test')); print(gemma_xla.__all__)"
    run = python(IMPORT_WITH_TORCH_ALONE + use)
    assert run.returncode == 0, run.stderr
    assert "Gemma" in run.stdout
    assert python(IMPORT_WITH_TORCH_ALONE + "import yaml").returncode != 0  # The block blocks.


def sizes(path: Path) -> tuple[int, dict[str, int]]:
    """Lines of the file, and of each function in it, decorators not counted."""
    text = path.read_text(encoding="utf-8")
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return len(text.splitlines()), {f"{n.name}, line {n.lineno}": n.end_lineno - n.lineno + 1 for n in functions}


FILES = sorted(path for folder in (PACKAGE, "recipes") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    length, functions = sizes(path)
    assert length <= 300
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}


def test_sizes_are_counted(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("def outer():\n" + "    x = 1\n" * 70 + "    async def inner():\n        pass\n")
    assert sizes(path) == (73, {"outer, line 1": 73, "inner, line 72": 2})
