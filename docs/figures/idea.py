"""Draw the project's idea: `python docs/figures/idea.py` writes docs/figures/idea.svg.

Boxes of middle tones with white text, lines in grey, no background: legible on light pages and on dark ones.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

BLUE, GREEN, VIOLET = "#2f6fb0", "#2d7d46", "#7a4fa3"
LINE = "#808080"
WIDTH, HEIGHT, BOX = 880, 240, (190, 80)
# Left edge, top edge, colour, lines of text: the first in bold.
BOXES = {
    "config": (0, 80, BLUE, ["One YAML file", "model, data, mesh,", "how to train"]),
    "step": (230, 80, BLUE, ["One step, one graph", "plain PyTorch, split", "by a table of rules"]),
    "plan": (460, 0, VIOLET, ["gemma-xla plan", "the TPU compiler,", "on your laptop"]),
    "launch": (460, 160, GREEN, ["accelerate launch", "TPU slice, GPUs,", "or your laptop"]),
    "answer": (690, 0, VIOLET, ["Before you pay", "does it fit? how fast?", "days and dollars"]),
    "model": (690, 160, GREEN, ["When it is done", "Hugging Face folder", "or peft adapter"]),
}
ARROWS = [("config", "step"), ("step", "plan"), ("step", "launch"), ("plan", "answer"), ("launch", "model")]


def figure() -> str:
    """The figure as SVG."""
    arrows = [_arrow(BOXES[start], BOXES[end]) for start, end in ARROWS]
    head = (
        f'<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="system-ui, sans-serif" font-size="15" text-anchor="middle" role="img">',
            "<title>One config becomes one step; the TPU compiler judges it before you pay, a launch trains it</title>",
            f"<defs>{head}</defs>",
            *arrows,
            *(_box(*box) for box in BOXES.values()),
            "</svg>\n",
        ]
    )


def _box(left: int, top: int, colour: str, lines: list[str]) -> str:
    width, height = BOX
    texts = [
        f'<text x="{left + width // 2}" y="{top + 26 + 20 * i}" fill="#ffffff" font-weight="{400 if i else 700}">'
        f"{escape(line)}</text>"
        for i, line in enumerate(lines)
    ]
    return f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="8" fill="{colour}"/>' + "".join(texts)


def _arrow(start: tuple, end: tuple) -> str:
    (x, y), (u, v) = ((box[0], box[1] + BOX[1] // 2) for box in (start, end))
    x, middle = x + BOX[0], (x + BOX[0] + u) // 2
    path = f"M{x} {y}C{middle} {y} {middle} {v} {u - 4} {v}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>'


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(figure(), encoding="utf-8")
