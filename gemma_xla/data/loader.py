"""Batches made ahead of time by a background thread, each with the position that follows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from gemma_xla.data.documents import Corpus, TrainDocuments
from gemma_xla.data.packing import Document, Lane, pack
from gemma_xla.data.prefetch import prefetch
from gemma_xla.data.sources import digest
from gemma_xla.data.streams import first_position
from gemma_xla.errors import UserError
from gemma_xla.model.loss import IGNORE_INDEX

Batch = dict[str, torch.Tensor]


class TrainLoader:
    """Endless batches of one process's rows: lanes ``rows`` of a global batch of ``num_rows``.

    A batch holds ``input_ids``, ``position_ids``, ``segment_ids`` and ``shift_labels``, each ``[len(rows), seq_len]``
    on the CPU (see `packing.pack`). Rows of text are full. `close` it, or use it as a context manager.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, num_rows: int, rows: range):
        config = corpus.config
        self._seq_len, self._prefetch, self._pad = config.seq_len, config.prefetch, tokenizer.pad_token_id
        self._documents = corpus.train_documents(tokenizer, rows, num_rows)
        weights = [source.weight for source in corpus.train_sources]
        packing = {"seq_len": self._seq_len, "seed": corpus.seed, "packing": config.packing}
        self._lanes = {row: Lane(row, self._documents, weights, **packing) for row in rows}
        # What a position is only meaningful with.
        self._setup = {
            "num_rows": num_rows,
            "seed": corpus.seed,
            "shuffle": config.shuffle,
            "documents": [source.num_documents for source in corpus.train_sources],
            "weights": weights,
            "eval_fraction": 0.0 if config.eval else config.eval_fraction,
            "format": [source.format for source in corpus.train_sources],
            "chat_template": self._template(corpus, tokenizer),
            "content": [source.content for source in corpus.train_sources],
        }
        self._fields = [source.field for source in corpus.train_sources]
        # Position and contents of the last batch delivered; batches made ahead do not count.
        self._state = {"batches": 0, **_positions(self._lanes, self._documents)}
        self._names: dict[int, list[str]] = {}
        self._batches: Iterator[_Made] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            made = _make(self._lanes, self._documents, self._state["batches"], self._seq_len, self._pad)
            self._batches = prefetch(made, self._prefetch)
        try:
            batch, self._state, self._names = next(self._batches)
        except BaseException:
            self.close()
            raise
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch delivered, for JSON; it covers this process's lanes.

        `merge_states` puts those of all processes together, and any number of processes can continue from that.
        """
        return {"setup": self._setup, **self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that the position refers to.

        Raises:
            UserError: it is the position of other data, or lanes of this process are missing in it.
        """
        self._check_setup(state["setup"])
        if missing := [row for row in self._lanes if str(row) not in state["lanes"]]:
            raise UserError(f"data: the saved position lacks rows {missing}; merge the positions of all processes")
        self._stop()
        lanes = {str(row): state["lanes"][str(row)] for row in self._lanes}
        self._state, self._names = {"batches": state["batches"], "lanes": lanes, "streams": state["streams"]}, {}
        self._rewind()

    def stats(self) -> dict[str, float]:
        """Return what this process has delivered.

        That is: batches; tokens, and those of them that are learnt; finished documents; the fraction of padding.
        """
        batches, lanes = self._state["batches"], self._state["lanes"].values()
        tokens, positions = sum(lane["tokens"] for lane in lanes), batches * len(lanes) * self._seq_len
        return {
            "batches": batches,
            "tokens": tokens,
            "trained_tokens": sum(lane["trained_tokens"] for lane in lanes),
            "documents": sum(sum(lane["cursors"]) for lane in lanes),
            "padding": 1 - tokens / positions if positions else 0.0,
        }

    def describe(self) -> str:
        """Say which documents the last batch delivered came from, a line per row."""
        return "\n".join(f"row {row}: {', '.join(names)}" for row, names in self._names.items())

    def close(self) -> None:
        """Stop the background thread. Iterating again continues after the last batch delivered."""
        self._stop()
        self._rewind()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _template(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What tells chat templates apart, where there are chats."""
        chats = any(source.format == "messages" for source in corpus.train_sources)
        return digest([str(tokenizer.chat_template)]) if chats else None

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _rewind(self) -> None:
        """Put the lanes where the last batch delivered left them."""
        for row, lane in self._lanes.items():
            lane.load_state_dict(self._state["lanes"][str(row)])
        for number, documents in enumerate(self._documents):
            documents.seek(_cursors(self._lanes, number), self._state["streams"][number])

    def _check_setup(self, setup: dict[str, Any]) -> None:
        if setup.keys() != self._setup.keys():
            raise UserError(
                "data: the saved position is of another version of gemma_xla; continue with that version, or start anew"
            )
        for name, value in self._setup.items():
            if setup[name] != value and name != "content":
                raise UserError(
                    f"data: the saved position has {name} {setup[name]}, but this run has {value}; "
                    "continue with the same data, seed and rows per step, or choose another output_dir"
                )
        for field, theirs, ours in zip(self._fields, setup["content"], self._setup["content"], strict=True):
            if theirs != ours:
                raise UserError(
                    f"{field}: its text is not that of the saved position; bring it back, or choose another output_dir"
                )


class EvalLoader:
    """The held-out documents, each once and in order: finite, and from the start each time it is iterated.

    Row i of the packed text is row ``i % num_rows`` of batch ``i // num_rows``. Rows that are missing at the end are
    padding, so all processes see equally many batches of one shape. Every process packs all rows (only then does it
    know how many there are) and delivers its own, ``rows``.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, num_rows: int, rows: range):
        self._corpus, self._tokenizer = corpus, tokenizer
        self._num_rows, self._rows, self._pad = num_rows, rows, tokenizer.pad_token_id
        self._trained = self._tokens = self._positions = 0

    def __iter__(self) -> Iterator[Batch]:
        self._trained = self._tokens = self._positions = 0
        for batch in prefetch(self._make(), self._corpus.config.prefetch):
            self._trained += int((batch["shift_labels"] != IGNORE_INDEX).sum())
            self._tokens += int((batch["segment_ids"] > 0).sum())
            self._positions += batch["shift_labels"].numel()
            yield batch

    def stats(self) -> dict[str, float]:
        """Return what this process has delivered in the latest pass: tokens to predict, and the fraction of padding."""
        padding = 1 - self._tokens / self._positions if self._positions else 0.0
        return {"tokens": self._trained, "padding": padding}

    def _make(self) -> Iterator[Batch]:
        config, seq_len = self._corpus.config, self._corpus.config.seq_len
        documents = _Successive(self._corpus.eval_documents(self._tokenizer))
        lane = Lane(0, [documents], [1.0], seq_len, self._corpus.seed, config.packing)
        while True:
            rows = [lane.next_row() for _ in range(self._num_rows)]
            if not rows[0]:
                return
            yield pack([rows[row] for row in self._rows], seq_len, self._pad)


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Put together the positions of processes that own different rows of the same batch."""
    states = list(states)
    streams = zip(*(state["streams"] for state in states), strict=True)
    return {
        **states[0],
        "lanes": {row: lane for state in states for row, lane in state["lanes"].items()},
        "streams": [first_position(positions) for positions in streams],
    }


class _Made(NamedTuple):
    """A batch, the position after it, and the documents in each of its rows."""

    batch: Batch
    state: dict[str, Any]
    names: dict[int, list[str]]


def _make(
    lanes: dict[int, Lane], documents: list[TrainDocuments], batches: int, seq_len: int, pad_token_id: int
) -> Iterator[_Made]:
    # Not a method: the thread must not keep the loader alive, or it would never end by itself.
    while True:
        rows = {row: lane.next_row() for row, lane in lanes.items()}
        batches += 1
        names = {row: [piece.name for piece in pieces] for row, pieces in rows.items()}
        batch = pack(list(rows.values()), seq_len, pad_token_id)
        yield _Made(batch, {"batches": batches, **_positions(lanes, documents)}, names)


def _positions(lanes: dict[int, Lane], documents: list[TrainDocuments]) -> dict[str, Any]:
    return {
        # Keys are text, as in JSON.
        "lanes": {str(row): lane.state_dict() for row, lane in lanes.items()},
        "streams": [source.position(_cursors(lanes, number)) for number, source in enumerate(documents)],
    }


def _cursors(lanes: dict[int, Lane], source: int) -> dict[int, int]:
    """How many documents of a source each lane has finished."""
    return {row: lane.cursors[source] for row, lane in lanes.items()}


class _Successive:
    """Documents for a single lane, from an iterator."""

    def __init__(self, documents: Iterator[Document]):
        self._documents = documents

    def get(self, lane: int, cursor: int) -> Document | None:
        return next(self._documents, None)
