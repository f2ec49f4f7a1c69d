"""What a run is like on text it does not learn from: loss, token accuracy, and how it continues fixed prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gemma_xla.config import EvalSection
from gemma_xla.data.chat import prompt_tokens
from gemma_xla.data.loader import EvalLoader
from gemma_xla.errors import UserError
from gemma_xla.model.gemma import Gemma
from gemma_xla.sharding import INPUT_SPEC
from gemma_xla.storage import read_text, replace_text
from gemma_xla.train.run import Run
from gemma_xla.train.step import counts

Record = dict[str, Any]
# Rows that are continued are made this long or a power of two times as long: each length is compiled once.
_SHORTEST = 64


class Evaluator:
    """Evaluates a model on its devices, between two steps."""

    def __init__(self, run: Run, model: Gemma, share: Callable[[int], range], stopped: Callable[[], Any]) -> None:
        """
        Args:
            run: what to evaluate on.
            model: parallelized.
            share: this host's part of so many rows.
            stopped: whether to break off.

        Raises:
            UserError: a prompt leaves no room for its continuation.
        """
        self._run, self._model, self._backend = run, model, run.backend
        self._share, self._stopped = share, stopped
        self._section: EvalSection = run.config.eval
        chats = any(source.format == "messages" for source in run.corpus.train_sources)
        self._prompts = [prompt_tokens(run.tokenizer, prompt, chats) for prompt in self._section.prompts]
        limit = run.model_config.max_position_embeddings
        for number, tokens in enumerate(self._prompts):
            if len(tokens) >= limit:
                raise UserError(
                    f"eval.prompts[{number}] has {len(tokens)} tokens and the model {limit} positions; shorten it"
                )

    def figures(self) -> dict[str, float] | None:
        """Return ``eval_loss``, in nats per token, and ``eval_accuracy``; None if broken off."""
        rows = self._run.micro_batch_rows
        loader = EvalLoader(self._run.corpus, self._run.tokenizer, num_rows=rows, rows=self._share(rows))
        total = torch.zeros(4)
        with self._evaluating():
            for i, batch in enumerate(loader):
                if i == self._section.batches:
                    break
                if self._stopped():
                    return None
                placed = self._backend.place_batch(batch, INPUT_SPEC)
                sums = self._model(**placed, loss_chunk=self._run.config.train.loss_chunk, count_hits=True)
                sums = self._backend.total(torch.cat([sums, counts(placed)]))
                self._backend.flush()
                total += sums.cpu()
        loss, hits, trained, _ = total.tolist()
        return {"eval_loss": loss / trained, "eval_accuracy": hits / trained}

    def samples(self) -> list[str]:
        """Continue the config's prompts, always with the likeliest token.

        Without a cache of keys and values: the forward pass is that of training, so it runs sharded, scanned and
        rematerialised as that does.
        """
        limit, backend = self._section.max_new_tokens, self._backend
        if not self._prompts:
            return []
        shards = backend.mesh.batch_shards
        rows = -(-len(self._prompts) // shards) * shards
        done = [list(self._prompts[row % len(self._prompts)]) for row in range(rows)]
        length = _SHORTEST
        while length < max(map(len, done)) + limit:
            length *= 2
        length = min(length, self._run.model_config.max_position_embeddings)
        ended: set[int] = set()
        with self._evaluating():
            for _ in range(limit):
                if len(ended) == rows:
                    break
                for row, token in enumerate(self._next_tokens(done, length)):
                    if row not in ended and token not in self._run.end_tokens and len(done[row]) < length:
                        done[row].append(token)
                    else:
                        ended.add(row)
        new = (ids[len(prompt) :] for prompt, ids in zip(self._prompts, done, strict=False))
        return [self._run.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    def _next_tokens(self, done: list[list[int]], length: int) -> list[int]:
        mine = [done[row] for row in self._share(len(done))]
        batch = {
            "input_ids": torch.full((len(mine), length), self._run.tokenizer.pad_token_id, dtype=torch.int32),
            "segment_ids": torch.zeros(len(mine), length, dtype=torch.int32),
            "logits_at": torch.zeros(len(mine), length, dtype=torch.int32),
        }
        for row, ids in enumerate(mine):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["segment_ids"][row, : len(ids)] = 1
            batch["logits_at"][row, len(ids) - 1] = 1
        logits = self._model(**self._backend.place_batch(batch, INPUT_SPEC))
        tokens = self._backend.constrain(logits.argmax(-1), (None,), (None,))
        self._backend.flush()
        tokens = tokens.tolist()
        if len(tokens) == len(done):
            return tokens
        return [token for part in self._backend.gather_objects(tokens) for token in part]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradients and no dropout for a while."""
        self._model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._model.train()


def best(records: list[Record]) -> Record | None:
    """The first evaluation with the lowest loss."""
    return min((r for r in records if "eval_loss" in r), key=lambda r: r["eval_loss"], default=None)


def is_stale(records: list[Record], patience: int | None) -> bool:
    """Whether so many evaluations have brought no new lowest loss."""
    losses = [r["eval_loss"] for r in records if "eval_loss" in r]
    return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


class SampleLog:
    """``samples.jsonl``: what became of the prompts at each evaluation."""

    def __init__(self, path: Path, start: int) -> None:
        """
        Args:
            path: lines of steps after ``start`` are dropped: they will be taken again.
        """
        self._path = path
        lines = read_text(path).splitlines() if path.exists() else []
        self._records = [r for r in map(json.loads, lines) if r["step"] <= start]

    def write(self, step: int, prompts: list[str], completions: list[str]) -> None:
        """Add the lines of an evaluation; what cannot be written now is written with the next ones.

        Raises:
            Exception: whatever the file system has to say.
        """
        pairs = zip(prompts, completions, strict=True)
        self._records += [{"step": step, "prompt": prompt, "completion": text} for prompt, text in pairs]
        replace_text(self._path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self._records))
