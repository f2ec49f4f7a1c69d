"""What a run trains on, shown as it is encoded: which tokens are learnt, and which are only read."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from gemma_xla.config import RunConfig
from gemma_xla.data.chat import set_chat_template
from gemma_xla.data.documents import Corpus
from gemma_xla.data.packing import Document, Lane
from gemma_xla.data.tokenizer import load_tokenizer
from gemma_xla.errors import UserError
from gemma_xla.storage import fetched, location

# What begins and ends learnt text, text that is only read, and names.
_COLOURS = {"trained": ("\033[32m", "\033[0m"), "masked": ("\033[2m", "\033[0m"), "name": ("\033[1m", "\033[0m")}
_BRACKETS = {"trained": ("【", "】"), "masked": ("", ""), "name": ("", "")}
# The same for a notebook: black on opaque colours, whatever the theme; bold too, where colours are taken out.
_SHEET = "background:white;color:black;padding:0.7em;line-height:1.7;white-space:pre-wrap"
_TOKEN = "background:{};color:black;border:1px solid white;border-radius:3px"
_LEARNT, _READ = "#8fd9bd", "#e4e4e4"


def preview(config: RunConfig, count: int, out: TextIO) -> None:
    """Write the first ``count`` training examples, or pieces of text, of a run to ``out``.

    Opens the data and the tokenizer only. On a terminal, what is learnt is green and all else is dim; elsewhere, and
    where NO_COLOR is set, what is learnt stands between 【 and 】.

    Raises:
        UserError: the data or the tokenizer cannot be used, or the tokenizer is not there yet.
    """
    marks = _COLOURS if out.isatty() and not os.environ.get("NO_COLOR") else _BRACKETS
    begin, end = marks["name"]
    tokenizer, documents = _open(config)
    for number, document in zip(range(count), documents, strict=False):
        print(
            f"{begin}{_heading(document)}{end}",
            _marked(document, tokenizer, marks),
            sep="\n",
            end="\n" if number + 1 == count else "\n\n",
            file=out,
        )


def preview_html(config: RunConfig, count: int) -> str:
    """Return the first ``count`` training examples, or pieces of text, of a run as HTML.

    Each token has a box of its own, which tells its id under the mouse: green and bold is learnt, gray is only read.

    Raises:
        UserError: the data or the tokenizer cannot be used, or the tokenizer is not there yet.
    """
    tokenizer, documents = _open(config)
    blocks = []
    for _, document in zip(range(count), documents, strict=False):
        boxes = [_box(token, learnt, tokenizer) for token, learnt in _tokens(document)]
        blocks.append(f'<pre style="{_SHEET}">{html.escape(_heading(document))}\n{"".join(boxes)}</pre>')
    return "\n".join(blocks)


def _open(config: RunConfig) -> tuple[PreTrainedTokenizerBase, Iterator[Document]]:
    """A run's tokenizer, and its examples and pieces of text."""
    tokenizer = _tokenizer(config)
    set_chat_template(tokenizer, config.data)
    return tokenizer, _documents(Corpus(config.data, seed=config.seed), tokenizer)


def _heading(document: Document) -> str:
    trained = document.pairs if document.trained is None else int(document.trained[1:].sum())
    return f"{document.name}: {document.pairs + 1:,} tokens, {trained:,} of them trained"


def _tokens(document: Document) -> list[tuple[int, bool]]:
    """Each token, and whether it is learnt."""
    # The first token is never predicted.
    return list(zip(document.tokens.tolist(), [False, *(label >= 0 for label in document.labels)], strict=True))


def _box(token: int, learnt: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as HTML; a line break is shown, and breaks the line."""
    text = html.escape(tokenizer.decode([token], skip_special_tokens=False)).replace("\n", "↵\n")
    tag, colour = ("b", _LEARNT) if learnt else ("span", _READ)
    return f'<{tag} title="{token}" style="{_TOKEN.format(colour)}">{text}</{tag}>'


def _documents(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Examples and pieces of text in the order of training, if a step had one row."""
    documents = corpus.train_documents(tokenizer, range(1), 1)
    weights = [source.weight for source in corpus.train_sources]
    lane = Lane(0, documents, weights, corpus.config.seq_len, corpus.seed, corpus.config.packing)
    while True:
        yield from lane.next_row()


def _marked(document: Document, tokenizer: PreTrainedTokenizerBase, marks: dict[str, tuple[str, str]]) -> str:
    """The text of a document, special tokens included, with marks around what is learnt and what is not."""
    text = ""
    for trained, group in groupby(_tokens(document), key=lambda pair: pair[1]):
        begin, end = marks["trained" if trained else "masked"]
        # Terminals obey what follows an escape character.
        part = tokenizer.decode([token for token, _ in group], skip_special_tokens=False).replace("\033", "␛")
        text += f"{begin}{part}{end}"
    return text


def _tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a run of this config uses."""
    run = location(config.output_dir) / "tokenizer"
    named = config.data.tokenizer or (config.model.init_from if config.data.vocab_size is None else None)
    if _is_tokenizer(run):
        folder = run
    elif named is None:
        raise UserError(
            "data.tokenizer is missing: a run trains a tokenizer first, and there is none in "
            f"{config.output_dir} yet; start the run, or name a tokenizer"
        )
    elif _is_tokenizer(location(named) / "tokenizer"):  # a run of ours
        folder = location(named) / "tokenizer"
    else:
        return load_tokenizer(named)
    with fetched(folder) as local:
        return load_tokenizer(local)


def _is_tokenizer(folder: Path) -> bool:
    try:
        return (folder / "tokenizer.json").exists()
    except OSError:  # what cannot be a path may be a name on the hub
        return False
