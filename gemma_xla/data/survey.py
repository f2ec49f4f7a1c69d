"""A look at all examples before training: what they come to in tokens, what of them does not fit, how long an epoch is.

Mistakes in single examples show here, not hours into a run. Text is left alone, unless its epochs are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gemma_xla.data.documents import Corpus
from gemma_xla.data.examples import ExampleEncoder, source_encoder
from gemma_xla.data.packing import Example, Lane
from gemma_xla.data.sources import IndexedSource, Source
from gemma_xla.errors import UserError


@dataclass
class Counts:
    """What examples come to: a token is counted where it is predicted."""

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0

    def describe(self, name: str, seq_len: int) -> str:
        """Return a line about them."""
        text = f"{name}: {self.examples:,} examples, {self.tokens:,} tokens, {self.trained_tokens:,} of them trained"
        if self.truncated or self.dropped:
            text += (
                f"; {self.truncated:,} truncated, {self.dropped:,} dropped (data.seq_len {seq_len:,}, the longest has "
                f"{self.longest:,} tokens)"
            )
        return text


@dataclass
class Survey:
    """What a run's examples come to; streams and text are left out.

    ``lengths`` holds, for each training source that was looked at, the tokens of each of its documents.
    """

    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    train: Counts = field(default_factory=Counts)
    held_out: Counts = field(default_factory=Counts)
    lengths: dict[int, np.ndarray] = field(default_factory=dict)

    def describe(self) -> str:
        """Return a line about the training examples, one about those held out, or nothing where there are none."""
        named = (("data.train", self.train), ("held out", self.held_out))
        return "\n".join(counts.describe(name, self.seq_len) for name, counts in named if counts.examples)


def survey(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Survey:
    """Encode every example of a corpus once, and count. Of a corpus of text and streams, nothing is read.

    Raises:
        UserError: chats have no template, or it refuses one; of an example nothing is left to learn, or of a source.
    """
    for source in (*corpus.train_sources, *corpus.eval_sources):
        source_encoder(tokenizer, source, corpus.config)  # streams lack no template either
    found = Survey(tokenizer, corpus.config.seq_len)
    for number, source in enumerate(corpus.train_sources):
        if isinstance(source, IndexedSource) and source.format != "text":
            found.lengths[number] = _look(corpus, source, tokenizer, corpus.train_texts(number), found.train)
    for source, documents in corpus.held_out():
        if isinstance(source, IndexedSource) and source.format != "text":
            _look(corpus, source, tokenizer, (text for _, text in documents), found.held_out)
    return found


def steps_of_epochs(corpus: Corpus, survey: Survey, rows: int, epochs: float = 1.0) -> int:
    """Return after how many global batches of ``rows`` rows every lane has finished its share of so many epochs.

    With several sources, an epoch is as many documents as they hold together, drawn by their weights. Text is
    tokenized to find out.

    Raises:
        UserError: a source is a stream, whose length nobody knows.
    """
    documents = []
    for number, source in enumerate(corpus.train_sources):
        if not isinstance(source, IndexedSource):
            raise UserError(
                f"train.epochs: {source.field} is a stream, and nobody knows its length; set train.steps instead"
            )
        if number not in survey.lengths:
            encode = source_encoder(survey.tokenizer, source, corpus.config)
            texts = _with_bar(corpus.train_texts(number), source)
            survey.lengths[number] = np.array([len(encode(text)) for text in texts])
        lengths = np.zeros(source.num_documents, dtype=np.int64)
        lengths[corpus.train_indices(number)] = survey.lengths[number]
        stand_in = _Lengths(source.field, source.format, lengths)
        documents.append(corpus.indexed_documents(number, stand_in, stand_in.encode, rows))
    weights = [source.weight for source in corpus.train_sources]
    config, total = corpus.config, math.ceil(epochs * sum(source.per_epoch for source in documents))
    lanes = (Lane(row, documents, weights, config.seq_len, corpus.seed, config.packing) for row in range(rows))
    return max(_rows_until(lane, len(range(row, total, rows))) for row, lane in enumerate(lanes))


def _rows_until(lane: Lane, documents: int) -> int:
    """How many rows a lane makes until it has finished so many documents."""
    rows = 0
    while sum(lane.cursors) < documents:
        lane.next_row()
        rows += 1
    return rows


def _look(
    corpus: Corpus, source: Source, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], counts: Counts
) -> np.ndarray:
    """Add a source's examples to the counts; return how many tokens of each are kept."""
    encoder, lengths, longest = ExampleEncoder(tokenizer, source, corpus.config), [], 0
    for text in _with_bar(texts, source):
        whole = encoder.whole(text)
        kept = encoder.fitted(whole, text)
        lengths.append(len(kept.tokens))
        longest = max(longest, len(whole.tokens))
        counts.trained_tokens += int(kept.trained[1:].sum())
        counts.dropped += len(kept.tokens) == 1
        counts.truncated += 1 < len(kept.tokens) < len(whole.tokens)
    if lengths and max(lengths) == 1:
        raise UserError(
            f"{source.field}: all of its {len(lengths):,} examples are longer than data.seq_len "
            f"({corpus.config.seq_len:,}) and dropped; the longest has {longest:,} tokens: raise data.seq_len, or set "
            "data.too_long=truncate"
        )
    counts.examples += len(lengths)
    counts.tokens += sum(lengths) - len(lengths)
    counts.longest = max(counts.longest, longest)
    return np.array(lengths)


def _with_bar(texts: Iterable[str], source: Source) -> Iterable[str]:
    """The texts, with a progress bar where they take their time."""
    return tqdm(texts, desc=f"Reading {source.field}", unit=" documents", delay=2, disable=None, leave=False)


@dataclass(frozen=True)
class _Lengths:
    """Stands in for a source of whose documents only the length matters."""

    field: str
    format: str
    lengths: np.ndarray

    def text(self, index: int) -> int:
        return index

    def encode(self, index: int) -> np.ndarray | Example:
        tokens = np.broadcast_to(np.int32(0), self.lengths[index])
        return tokens if self.format == "text" else Example(tokens, np.broadcast_to(True, self.lengths[index]))
