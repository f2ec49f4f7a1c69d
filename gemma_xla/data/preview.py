"""What a run trains on, shown as it is encoded: which tokens are learnt, and which are only read."""

from __future__ import annotations

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


def preview(config: RunConfig, count: int, out: TextIO) -> None:
    """Write the first ``count`` training examples, or pieces of text, of a run to ``out``.

    Opens the data and the tokenizer only. On a terminal, what is learnt is green and all else is dim; elsewhere, and
    where NO_COLOR is set, what is learnt stands between 【 and 】.

    Raises:
        UserError: the data or the tokenizer cannot be used, or the tokenizer is not there yet.
    """
    marks = _COLOURS if out.isatty() and not os.environ.get("NO_COLOR") else _BRACKETS
    tokenizer = _tokenizer(config)
    set_chat_template(tokenizer, config.data)
    corpus = Corpus(config.data, seed=config.seed)
    for number, document in zip(range(count), _documents(corpus, tokenizer), strict=False):
        trained = document.pairs if document.trained is None else int(document.trained[1:].sum())
        begin, end = marks["name"]
        print(
            f"{begin}{document.name}: {document.pairs + 1:,} tokens, {trained:,} of them trained{end}",
            _marked(document, tokenizer, marks),
            sep="\n",
            end="\n" if number + 1 == count else "\n\n",
            file=out,
        )


def _documents(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Examples and pieces of text in the order of training, if a step had one row."""
    documents = corpus.train_documents(tokenizer, range(1), 1)
    weights = [source.weight for source in corpus.train_sources]
    lane = Lane(0, documents, weights, corpus.config.seq_len, corpus.seed, corpus.config.packing)
    while True:
        yield from lane.next_row()


def _marked(document: Document, tokenizer: PreTrainedTokenizerBase, marks: dict[str, tuple[str, str]]) -> str:
    """The text of a document, special tokens included, with marks around what is learnt and what is not."""
    # The first token is never predicted.
    learnt = [False, *(label >= 0 for label in document.labels)]
    text = ""
    for trained, group in groupby(zip(document.tokens.tolist(), learnt, strict=True), key=lambda pair: pair[1]):
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
