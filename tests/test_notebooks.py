"""The notebooks: what is committed is what a run from top to bottom shows, and they hold no logic of their own."""

from __future__ import annotations

import ast
import base64
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from matplotlib.image import imread
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from notebooks.execute import FOLDER, NOTEBOOKS, clean, execute

ALLOWED = {"gemma_xla", "torch", "transformers", "peft", "numpy", "pandas", "matplotlib", "IPython"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
# A folder of this or that machine; a path below "~" or a URL is none.
MACHINE = re.compile(r"(?<![\w.~/:-])/(?:home|root|tmp|work|usr|opt|var|mnt|srv|data|content|Users|private)\b")
NAMES = ["1_inside_gemma", "2_finetune_your_text", "3_plan_before_you_pay", "4_mfu_honestly"]


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


def figures(notebook: nbformat.NotebookNode) -> list[bytes]:
    data = (output.get("data", {}) for output in outputs(notebook))
    return [base64.b64decode(one["image/png"]) for one in data if "image/png" in one]


def words(notebook: nbformat.NotebookNode) -> str:
    """All text in a notebook, its outputs' included."""
    found = [cell.source for cell in notebook.cells]
    for output in outputs(notebook):
        found.append(output.get("text", ""))
        found += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(found)


def nodes(source: str) -> list[ast.AST]:
    """The syntax of a cell, magics translated."""
    if source.startswith("%%writefile"):
        return []
    return list(ast.walk(ast.parse(TransformerManager().transform_cell(source))))


def imported(source: str) -> set[str]:
    """The top-level packages that a cell imports."""
    found = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def test_all_four_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(path.name in readme for path in NOTEBOOKS)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


class TestCommitted:
    def test_it_was_run_once_from_top_to_bottom(self, notebook):
        nbformat.validate(notebook)
        counts = [cell.execution_count for cell in code(notebook)]
        assert counts == list(range(1, len(counts) + 1))
        assert notebook.cells[0].source.startswith("# ")

    def test_it_shows_figures_on_white(self, notebook):
        assert len(figures(notebook)) >= 2
        for png in figures(notebook):
            image = imread(io.BytesIO(png))
            corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert np.all(corners == 1.0)
            assert image.shape[-1] == 3 or image[..., 3].min() == 1.0

    def test_it_shows_no_error_and_nothing_of_the_machine(self, notebook):
        assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
        assert MACHINE.findall(words(notebook)) == []
        assert "\x1b" not in words(notebook)
        # What `execute` takes out is not there.
        assert clean(nbformat.from_dict(notebook), Path("/nowhere")) == notebook

    def test_it_imports_the_library_and_little_else(self, notebook):
        packages = set().union(*(imported(cell.source) for cell in code(notebook)))
        assert packages - ALLOWED - set(sys.stdlib_module_names) == set()
        assert "gemma_xla" in packages
        assert "gemma_xla.xla" not in words(notebook)

    def test_it_holds_no_logic_of_its_own(self, notebook):
        found = [node for cell in code(notebook) for node in nodes(cell.source)]
        assert [node.lineno for node in found if isinstance(node, DEFINITIONS)] == []


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(path, notebook, tmp_path, capsys):
    begun = time.perf_counter()
    done = execute(path, {**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    seconds = time.perf_counter() - begun
    with capsys.disabled():
        print(f"\n{path.name}: {seconds:.0f} s")
    assert seconds < 300
    assert len(figures(done)) == len(figures(notebook))
    assert [cell.source for cell in done.cells] == [cell.source for cell in notebook.cells]
    assert MACHINE.findall(words(done)) == []


class TestTheseChecks:
    """They would find what they look for."""

    @pytest.mark.parametrize("text", ["in /home/me/x", "('/tmp/a')", "file:\n/root", "/Users/me"])
    def test_paths(self, text):
        assert MACHINE.search(text)

    @pytest.mark.parametrize("text", ["~/tmp/a", "runs/tmp", "https://host/home/a", "../usr", "and/or"])
    def test_no_paths(self, text):
        assert not MACHINE.search(text)

    def test_imports_and_definitions(self):
        source = "if True:\n    %pip install x\nimport os.path\nfrom torch_xla.core import a\nf = lambda: 1"
        assert imported(source) - {"IPython"} == {"os", "torch_xla"}
        assert any(isinstance(node, DEFINITIONS) for node in nodes(source))
        assert nodes("%%writefile a.txt\nnot python") == []

    def test_cleaning(self, tmp_path):
        out = [
            new_output("stream", name="stdout", text="one "),
            new_output("stream", name="stderr", text="50%|###"),
            new_output("stream", name="stdout", text=f"{tmp_path}/runs\n"),
            new_output("display_data", data={"text/plain": f"'{tmp_path}/a'", "image/png": "aaaa"}),
        ]
        info = {"name": "python", "version": "3.11.7"}
        cells = [new_markdown_cell("# a"), new_code_cell("1", outputs=out, metadata={"execution": {"at": "now"}})]
        cleaned = clean(new_notebook(cells=cells, metadata={"language_info": info}), tmp_path)
        assert [cell.id for cell in cleaned.cells] == ["cell-0", "cell-1"]
        assert cleaned.cells[1].metadata == {} and "version" not in cleaned.metadata.language_info
        text, picture = cleaned.cells[1].outputs
        assert (text.name, text.text) == ("stdout", "one runs\n")
        assert picture.data == {"text/plain": "'a'", "image/png": "aaaa"}
