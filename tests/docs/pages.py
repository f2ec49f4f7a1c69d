"""The project's Markdown pages, taken apart: code blocks, code in a line, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "recipes", "benchmarks", "notebooks")
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
_COMMANDS = ("gemma-xla", "accelerate", "python", "make", "pip")


class Block(NamedTuple):
    """A fenced block: its language and marks (what stands behind the fence), its text, and the line it begins at."""

    marks: tuple[str, ...]
    text: str
    line: int

    @property
    def language(self) -> str:
        return self.marks[0] if self.marks else ""


class Command(NamedTuple):
    """A command as a shell would split it, without variables set before it; ``output``: what the page shows of it."""

    words: tuple[str, ...]
    line: int
    output: str | None = None


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def inline(path: Path, kind: str) -> Iterator[Token]:
    """The tokens of a kind that stand in a line of text."""
    for token in tokens(path):
        yield from (child for child in token.children or () if child.type == kind)


def blocks(path: Path) -> list[Block]:
    fences = (token for token in tokens(path) if token.type == "fence")
    return [Block(tuple(token.info.split()), token.content, token.map[0] + 1) for token in fences]


def pairs(path: Path) -> Iterator[tuple[Block, Block]]:
    """Each block of a page with the one behind it."""
    found = blocks(path)
    return zip(found, [*found[1:], Block((), "", 0)], strict=False)


def links(path: Path) -> list[str]:
    """Where links and images point to."""
    return [t.attrs["href"] for t in inline(path, "link_open")] + [t.attrs["src"] for t in inline(path, "image")]


def anchors(path: Path) -> set[str]:
    """What a link can point to in a page, as GitHub names its headings."""
    found: set[str] = set()
    everything = tokens(path)
    for token, content in zip(everything, everything[1:], strict=False):
        if token.type == "heading_open":
            text = "".join(child.content for child in content.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(next(s for s in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if s not in found))
    return found


def spans(path: Path) -> list[str]:
    """The code that stands in lines of text."""
    return [token.content for token in inline(path, "code_inline")]


def commands(path: Path) -> list[Command]:
    """The commands of ours, and of tools that start ours, in a page's shell blocks and lines of text."""
    shell = [block for block in blocks(path) if block.language in ("", "sh", "bash", "console")]
    found = [command for block in shell for command in _in_block(block)]
    for span in spans(path):
        words = _words(span)
        # "python" alone is a language.
        if words and (words[0] != "python" or any(word.endswith(".py") for word in words)):
            found.append(Command(words, 0))
    return found


def _in_block(block: Block) -> Iterator[Command]:
    """What follows a command behind a ``$``, up to the next, is its output."""
    text = block.text.replace("\\\n", " ")
    prompted = block.language == "console"
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:] if prompted else text.splitlines()
    for part in parts:
        line, _, output = part.partition("\n")
        if words := _words(line):
            yield Command(words, block.line, output.strip("\n") if prompted else None)


def _words(line: str) -> tuple[str, ...]:
    line = line.strip().removeprefix("$ ")
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        # An apostrophe: a sentence, and no command.
        return ()
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return tuple(words) if words and words[0] in _COMMANDS else ()
