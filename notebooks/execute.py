"""Run the notebooks from top to bottom and keep what they print and draw: `python notebooks/execute.py [FILE ...]`.

Each runs in a fresh folder, so that nothing an earlier run left behind decides what it shows. What would differ from
machine to machine is taken out before it is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Of one cell.
_TIMEOUT = 300
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, help="default: all of them")
    for path in parser.parse_args().notebooks:
        begun = time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path}: {time.perf_counter() - begun:.0f} s", flush=True)


def execute(path: Path, environment: dict[str, str] | None = None) -> nbformat.NotebookNode:
    """Return the notebook with what it shows now; the file stays as it is.

    Args:
        environment: of the kernel, this process' by default.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = dict(os.environ if environment is None else environment)
    # Models this small gain little from a second thread, and on a busy machine lose most of their time to it.
    environment.setdefault("OMP_NUM_THREADS", "1")
    # The library of this tree, whichever is installed.
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), *filter(None, [environment.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="gemma-xla-notebook-") as parent:
        folder = Path(parent).resolve() / "notebooks"
        folder.mkdir()
        shutil.copytree(FOLDER.parent / "recipes", folder.parent / "recipes", ignore=shutil.ignore_patterns("runs"))
        resources = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, timeout=_TIMEOUT, resources=resources, record_timing=False)
        client.extra_arguments = ["--log-level=ERROR"]
        client.execute(env=environment)
        return clean(notebook, folder)


def clean(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Take out progress and warnings (all that goes to stderr), the folder's path, and what the kernel says of itself.

    Returns the same notebook.
    """
    notebook.metadata = nbformat.from_dict(_METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if cell.cell_type == "code":
            outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = _joined(outputs)
            for output in cell.outputs:
                _shorten(output, f"{folder}/")
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs, with printed text that came in pieces as one."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _shorten(output: nbformat.NotebookNode, prefix: str) -> None:
    if output.output_type == "stream":
        output.text = output.text.replace(prefix, "")
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            output.data[kind] = value.replace(prefix, "")


if __name__ == "__main__":
    main()
