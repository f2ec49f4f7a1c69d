"""Continues prompts: the prompts in one pass (prefill), then one token a step (decode).

Shape letters: B batch rows, P prefilled positions, T positions in this pass, S positions in the cache, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gemma_xla.errors import UserError
from gemma_xla.infer.cache import KVCache
from gemma_xla.infer.sampling import Sampling, next_token
from gemma_xla.model.attention import Mask
from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma

_SMALLEST_BUCKET = 16


def generate(model: Gemma, input_ids: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Return each prompt's continuation: without the prompt, up to and including its end-of-sequence token.

    Args:
        model: on any device.
        input_ids: the prompts' token ids; lengths may differ.
        options: those of `generate_steps`.
    """
    rows: list[list[int]] = [[] for _ in input_ids]
    for tokens in generate_steps(model, input_ids, **options):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def generate_steps(
    model: Gemma,
    input_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    sync: Callable[[], None] | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each row, step by step; None for a row that has ended.

    Args:
        model: on any device.
        input_ids: the prompts' token ids; lengths may differ.
        max_new_tokens: the most tokens to add to a prompt.
        eos_token_id: the ids that end a row; None: that of the model's config; an empty list: none do.
        temperature, top_k, top_p: see `Sampling`.
        seed: decides all draws.
        sync: called once a step, before its tokens are read. On a lazy device it must run all pending work, the cache's
            included (``torch_xla.sync``), or each step is compiled anew, together with those before it.

    Raises:
        UserError: a prompt is empty, has an unknown id or is too long, or an option is out of range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(input_ids, max_new_tokens, model.config)
    ends = _as_set(model.config.eos_token_id if eos_token_id is None else eos_token_id)
    generator = torch.Generator().manual_seed(seed)
    decoder = _Decoder(model, input_ids, max_new_tokens)
    ended = [False] * len(input_ids)
    next_B = None
    for _ in range(max_new_tokens):
        logits_BV = decoder.prefill() if next_B is None else decoder.decode(next_B)
        next_B = next_token(logits_BV, torch.rand(len(input_ids), generator=generator).to(logits_BV.device), sampling)
        if sync is not None:
            sync()
        tokens = next_B.tolist()
        yield [None if end else token for end, token in zip(ended, tokens, strict=True)]
        ended = [end or token in ends for end, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return


class _Decoder:
    """A batch of prompts, their cache, and how far they are.

    Prompts end at the same place: shorter ones are padded on the left. They are padded to a power of two, so that
    prompts of similar length share compiled programs.
    """

    def __init__(self, model: Gemma, input_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.device = model.model.embed_tokens.weight.device
        self.next_index = max(_SMALLEST_BUCKET, 1 << (max(map(len, input_ids)) - 1).bit_length())
        padding = [self.next_index - len(ids) for ids in input_ids]
        self.cache = KVCache(self.next_index + max_new_tokens)
        pad = model.config.pad_token_id
        prompt = [[pad] * n + list(ids) for n, ids in zip(padding, input_ids, strict=True)]
        self.prompt_BP = torch.tensor(prompt, device=self.device)
        self.start_B1 = torch.tensor(padding, device=self.device)[:, None]
        # Padding is segment 0, everything else segment 1: places not yet filled are out of sight as they come later.
        self.segment_ids_BS = (torch.arange(self.cache.length, device=self.device) >= self.start_B1).long()

    def prefill(self) -> torch.Tensor:
        """Run the prompts; return the logits that follow them, ``[B, V]``."""
        return self._forward(self.prompt_BP, torch.arange(self.next_index, device=self.device))

    def decode(self, token_B: torch.Tensor) -> torch.Tensor:
        """Run one more token per row; return the logits that follow it, ``[B, V]``."""
        index_1 = torch.tensor([self.next_index], device=self.device)
        self.next_index += 1
        return self._forward(token_B[:, None], index_1)

    @torch.no_grad()
    def _forward(self, input_ids_BT: torch.Tensor, index_T: torch.Tensor) -> torch.Tensor:
        self.cache.index_T = index_T
        position_ids_BT = (index_T - self.start_B1).clamp(min=0)
        h_BTD = self.model.model(input_ids_BT, position_ids_BT, Mask(self.segment_ids_BS, index_T), self.cache)
        # The last position alone: logits of a whole prompt would be its largest tensor by far.
        return F.linear(h_BTD[:, -1], self.model.model.embed_tokens.weight)


def _check(input_ids: Sequence[Sequence[int]], max_new_tokens: int, config: GemmaConfig) -> None:
    if not input_ids or not all(len(ids) for ids in input_ids):
        raise UserError("prompt: it has no tokens; give at least one (the beginning-of-sequence token will do)")
    for token in {token for ids in input_ids for token in ids}:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"prompt: token id {token} is not in the vocabulary of {config.vocab_size}; check tokenizer"
            )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    longest = max(map(len, input_ids))
    if longest + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"prompt: {longest} tokens and max_new_tokens ({max_new_tokens}) exceed the model's "
            f"max_position_embeddings ({config.max_position_embeddings}); shorten one of them"
        )


def _as_set(ids: int | Sequence[int]) -> set[int]:
    return {ids} if isinstance(ids, int) else set(ids)
