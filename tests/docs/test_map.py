"""What the pages show of the code is what is there: the README's tree, the figure of imports, the drawn figure."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.test_layering import GRAPH, ORDER, PACKAGE, place

README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs/architecture.md"


def tree() -> str:
    (found,) = (block.text for block in blocks(README) if "\ngemma_xla/\n" in block.text)
    return found


def named(text: str) -> dict[str, Path]:
    """The files and folders that a tree's lines name, and where they should be."""
    found, folders = {}, {}
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        first = line.split()[0]
        if depth < 8 and first.endswith("/"):
            folders[depth] = first
        here = ROOT.joinpath(*(folder for at, folder in sorted(folders.items()) if at < depth < 8))
        for path in re.findall(r"(?<![\w/])\.?[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|md|cfg|toml|txt|yaml)\b|/)", line):
            # Behind a folder's own name stand files in it.
            inside = here / first if first.endswith("/") and path != first else here
            found[path] = next((p / path for p in (inside, here, ROOT) if (p / path).exists()), here / path)
    return found


def test_what_the_tree_names_is_there():
    paths = named(tree())
    assert len(paths) > 30
    assert [path for path, where in paths.items() if not where.exists()] == []


def test_the_tree_names_every_module():
    modules = {path.name for path in (ROOT / PACKAGE).glob("*.py") if not path.name.startswith("__")}
    packages = {f"{path.parent.name}/" for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert sorted((modules | packages) - named(tree()).keys()) == []


def groups() -> list[list[str]]:
    """The layers, from top to bottom; the package itself goes with the command line."""
    return [sorted(group - {"", "__main__"}) for group in ORDER]


def import_edges() -> set[tuple[int, int]]:
    """Which group imports which, without those that follow from others."""
    below: dict[int, set[int]] = {rank: set() for rank in range(len(ORDER))}
    for module, targets in GRAPH.items():
        ours = {target for target in targets if target.split(".")[0] == PACKAGE}
        here = place(module.partition(".")[2])
        below[here] |= {place(target.partition(".")[2]) for target in ours} - {here}

    def reached(rank: int) -> set[int]:
        return below[rank].union(*(reached(other) for other in below[rank]))

    return {
        (rank, other)
        for rank, others in below.items()
        for other in others
        if not any(other in reached(between) for between in others - {other})
    }


def import_figure() -> str:
    """The figure of imports in Mermaid's language."""
    nodes = [f'    g{rank}["{"<br>".join(names)}"]' for rank, names in enumerate(groups())]
    arrows = [f"    g{rank} --> g{other}" for rank, other in sorted(import_edges())]
    return "\n".join(["flowchart TD", *nodes, *arrows, ""])


def test_the_figure_of_imports_is_that_of_the_code():
    (figure,) = (block.text for block in blocks(ARCHITECTURE) if block.language == "mermaid")
    assert figure == import_figure(), f"put this into {ARCHITECTURE.name}:\n{import_figure()}"


def test_the_table_of_layers_is_that_of_the_code():
    text = ARCHITECTURE.read_text(encoding="utf-8").partition("| group | what it is |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w.]+)`", row.split("|")[1]) for row in text.splitlines()[2:]]
    assert rows == groups()


@pytest.mark.parametrize("script", sorted((ROOT / "docs/figures").glob("*.py")), ids=lambda path: path.name)
def test_figures_are_what_their_scripts_draw(script):
    drawn = runpy.run_path(str(script))["figure"]()
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == drawn
