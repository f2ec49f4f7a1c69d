"""What the pages point to is there: links and anchors, paths, keys of the config; and every page is pointed to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemma_xla.config import RunConfig
from gemma_xla.config_base import Section
from gemma_xla.config_data import DataSection, SourceSection
from gemma_xla.config_file import _as_section
from tests.docs.pages import PAGES, ROOT, anchors, links, name, spans

INDEX = ROOT / "docs/README.md"
# Dated notes: they name what was there then.
HISTORY = {ROOT / "docs/LOG.md", ROOT / "CHANGELOG.md"}
# Where a path that a page names may begin.
HOMES = ("", "gemma_xla", "recipes/configs")
# They begin as keys of the config do, and are parameters, files or modules.
NOT_KEYS = re.compile(
    r"model\.(layers|embed_tokens|norm|config)\b|.*\.(py|jsonl|json|safetensors|yaml|parquet|txt|md)$"
)


def broken_links(page: Path) -> list[str]:
    found = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            found.append(f"{link}: no such heading")
    return found


def missing_paths(page: Path) -> list[str]:
    """Paths of our files in code spans that lead nowhere."""
    paths = (span for span in spans(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|md|yaml|toml|svg)", span))
    return [path for path in paths if not any((ROOT / home / path).exists() for home in HOMES)]


def keys(section: type[Section], prefix: str = "") -> set[str]:
    """All keys of the config, sections too; those of a source stand under ``data.train`` and ``data.eval``."""
    found = set()
    for key, field in section.model_fields.items():
        is_source = section is DataSection and key in ("train", "eval")
        inner = SourceSection if is_source else _as_section(field.annotation)
        found |= {prefix + key} | (keys(inner, f"{prefix}{key}.") if inner else set())
    return found


KEYS = keys(RunConfig)


def unknown_keys(page: Path) -> list[str]:
    """Code spans that look like keys of the config, with a value or without, and are none."""
    sections = "|".join(RunConfig.model_fields)
    found = []
    for span in spans(page):
        key = re.match(rf"({sections})\.[a-z_.0-9\[\]]+", span)
        if key and not NOT_KEYS.match(span):
            plain = re.sub(r"\[\d*\]", "", key[0]).rstrip(".")
            # The name of a model's field, whatever it is.
            plain = re.sub(r"^(model\.overrides|train\.keep)\..*", r"\1", plain)
            found += [span] if plain not in KEYS else []
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=name)
def test_paths_and_keys_are_there(page):
    assert missing_paths(page) == []
    assert unknown_keys(page) == []


def test_every_page_of_docs_is_in_the_index():
    listed = [(INDEX.parent / link).resolve() for link in links(INDEX) if "#" not in link and "://" not in link]
    pages = [path for path in PAGES if path.parent == INDEX.parent and path != INDEX]
    assert sorted({path for path in listed if path in pages}) == pages


def test_what_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, with `code`\n[a](#a-title-with-code) [b](#b) [c](none.md) [d](https://x.org/y) ![e](none.svg)\n"
        "`xla/splash.py` `xla/splish.py` `train.steps=3` `train.stepz` `data.train[0].path` `model.layers.0`"
    )
    assert broken_links(page) == ["#b: no such heading", "none.md: no such file", "none.svg: no such file"]
    assert missing_paths(page) == ["xla/splish.py"]
    assert unknown_keys(page) == ["train.stepz"]
