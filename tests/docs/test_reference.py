"""The reference of the public API builds without a warning, and every public name in it is documented."""

from __future__ import annotations

import importlib
import re
import runpy
import warnings
from collections.abc import Iterator

import pdoc.doc
import pytest

from tests.docs.pages import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs/reference.py"))
PUBLIC = SCRIPT["PUBLIC"]
# Fields say what they are by their name and type, and by the comment or the class's text.
DOCUMENTED = (pdoc.doc.Function, pdoc.doc.Class)


@pytest.fixture(scope="module")
def modules() -> dict[str, pdoc.doc.Module]:
    return {name: pdoc.doc.Module(SCRIPT["load"](name)) for name in PUBLIC}


def members(doc: pdoc.doc.Namespace) -> Iterator[pdoc.doc.Doc]:
    """What is public in a module or class and made there, and what is in it."""
    for member in doc.own_members:
        if not member.name.startswith("_"):
            yield member
            if isinstance(member, pdoc.doc.Class):
                yield from members(member)


def referenced(text: str) -> list[str]:
    """Names of ours that a text refers to."""
    return re.findall(r"`(gemma_xla\.[\w.]+)`", text)


def resolves(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            if not hasattr(value, attribute):
                return attribute in getattr(value, "__annotations__", {})
            value = getattr(value, attribute)
        return True
    return False


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name, modules):
    found = [modules[name], *members(modules[name])]
    assert [doc.fullname for doc in found if isinstance(doc, DOCUMENTED) and not doc.docstring] == []
    assert modules[name].docstring
    assert [ref for doc in found for ref in referenced(doc.docstring) if not resolves(ref)] == []


def test_the_reference_builds(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCRIPT["build"](tmp_path, search=False)
    pages = {str(path.relative_to(tmp_path).with_suffix("")).replace("/", ".") for path in tmp_path.rglob("*.html")}
    assert set(PUBLIC) <= pages
    config = (tmp_path / "gemma_xla/config.html").read_text(encoding="utf-8")
    # A comment of the schema.
    assert "Largest global gradient norm" in config
    assert "FlopCounter" in (tmp_path / "gemma_xla.html").read_text(encoding="utf-8")
