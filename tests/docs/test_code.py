"""Python in the pages runs, and prints what they say it prints."""

import contextlib
import io
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks, name, pairs
from tests.test_finetune import examples, given, tuned  # noqa: F401 (fixtures)


def run(block: Block, page: Path, namespace: dict) -> str:
    """Execute a block; return what it prints. Errors name the page and the line."""
    code = compile("\n" * block.line + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def run_page(page: Path, namespace: dict, *, slow: bool = False) -> None:
    """Execute a page's blocks in one namespace, and compare with the block marked ``output`` behind each.

    Without ``slow`` those that are marked so are left out.
    """
    for block, following in pairs(page):
        if block.language == "python" and (slow or "slow" not in block.marks):
            printed = run(block, page, namespace)
            if "output" in following.marks:
                assert printed == following.text


WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_in_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, {})


@pytest.mark.slow
def test_python_about_a_finished_run_runs(tuned, finished_run, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/my-lora").symlink_to(tuned)
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs/finetuning.md", {"BASE": finished_run / "export"}, slow=True)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.md"
    path.write_text(text)
    return path


def test_what_is_wrong_is_found(tmp_path):
    with pytest.raises(AssertionError):
        run_page(written(tmp_path, "output", "```python\nprint(1)\n```\n```text output\n2\n```\n"), {})
    page = written(tmp_path, "error", "\n```python\nx = 1\nx.nothing\n```\n")
    with pytest.raises(AttributeError) as error:
        run_page(page, {})
    last = error.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 4)
    page = written(tmp_path, "slow", "```python slow\nraise\n```\n")
    run_page(page, {})
    with pytest.raises(RuntimeError):
        run_page(page, {}, slow=True)
