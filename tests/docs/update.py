"""Write anew what the pages show of the code: `python -m tests.docs.update` (then look at the difference).

That is: what blocks of Python print, what fast commands print, the figure of imports.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.pages import PAGES, Block, name, pairs
from tests.docs.test_code import run
from tests.docs.test_commands import FAST, printed
from tests.docs.test_map import import_figure


def refreshed(page: Path) -> str:
    """Return a page's text with what it shows renewed."""
    lines, namespace = page.read_text(encoding="utf-8").split("\n"), {}
    new: list[tuple[Block, str]] = []
    for block, following in pairs(page):
        if block.language == "python" and "slow" not in block.marks:
            shown = run(block, page, namespace)
            if "output" in following.marks:
                new.append((following, shown))
        elif block.language == "console":
            new.append((block, _console(block.text)))
        elif block.language == "mermaid":
            new.append((block, import_figure()))
    for block, text in reversed(new):
        lines[block.line : block.line + block.text.count("\n")] = text.removesuffix("\n").split("\n")
    return "\n".join(lines)


def _console(text: str) -> str:
    """The same commands, with what they print now where that is known at once."""
    parts = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        program, verb, *rest = line.split("#")[0].split()
        if program == "gemma-xla" and verb in FAST:
            shown = f"{printed([verb, *rest])}\n"
        parts.append(f"$ {line}\n{shown}")
    return "".join(parts)


if __name__ == "__main__":
    for path in PAGES:
        before, after = path.read_text(encoding="utf-8"), refreshed(path)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{name(path)} is written anew")
