"""The whole model where tokens do not all see each other: padding, packed documents, windows, decoding with a cache."""

from __future__ import annotations

import pytest
import torch

from gemma_xla.model.attention import Mask
from tests.reference import (
    IMPLS,
    SHAPES,
    assert_close,
    assert_gradients_close,
    gradients,
    ours_from,
    pair,
    random_ids,
    reference_model,
    summed_loss,
)

GQA = SHAPES["gqa-16"]
every_impl = pytest.mark.parametrize("impl", IMPLS)


# Position ids by hand where the padding is on the left, as generation has it.
@pytest.mark.parametrize("side", ["right", "left"])
@every_impl
def test_padding(side, impl):
    ours, theirs = pair(GQA, impl)
    attention_mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] + [0] * 10])
    if side == "left":
        attention_mask = attention_mask.flip(1)
    real = attention_mask.bool()
    ids = random_ids(GQA, 3, 11).masked_fill(~real, GQA.pad_token_id)
    labels = random_ids(GQA, 3, 11, seed=1).masked_fill(~real, -100)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0) if side == "left" else None

    expected = theirs(ids, attention_mask=attention_mask, position_ids=position_ids).logits
    logits = ours(ids, position_ids, attention_mask)

    assert_close(logits[real], expected[real], "logits")
    assert logits.isfinite().all()
    loss = ours(ids, position_ids, attention_mask, labels, loss_chunk=4)
    assert_gradients_close(gradients(ours, loss), gradients(theirs, summed_loss(expected, labels)))


# Documents of several lengths, two of them a single token, with padding in the middle and at the end.
SEGMENT_IDS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 0], [4, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9]])
POSITION_IDS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5, 0], [0, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0]])
IDS, LABELS = random_ids(GQA, 2, 14), random_ids(GQA, 2, 14, seed=1)
DOCUMENTS = [(0, 1), (0, 2), (0, 3), (1, 4), (1, 1), (1, 9)]
every_document = pytest.mark.parametrize(("row", "segment"), DOCUMENTS)


def tokens_of(row: int, segment: int) -> torch.Tensor:
    """True at the document's places, ``[B, T]``."""
    here = torch.zeros_like(SEGMENT_IDS, dtype=torch.bool)
    here[row] = SEGMENT_IDS[row].eq(segment)
    return here


@every_impl
@every_document
def test_a_packed_document_equals_the_document_alone(impl, row, segment):
    ours, theirs = pair(GQA, impl)
    here = tokens_of(row, segment)
    alone, labels = IDS[here][None], LABELS[here][None]
    expected = theirs(alone).logits
    assert_close(ours(IDS, POSITION_IDS, SEGMENT_IDS)[here], expected[0], "packed")
    assert_close(ours(alone), expected, "alone")

    loss = ours(IDS, POSITION_IDS, SEGMENT_IDS, LABELS.masked_fill(~here, -100), loss_chunk=5)
    expected = summed_loss(expected, labels)
    assert_close(loss, expected, "loss")
    assert_gradients_close(gradients(ours, loss), gradients(theirs, expected))


@every_impl
def test_a_packed_row_has_the_summed_gradient_of_its_documents(impl):
    ours, theirs = pair(GQA, impl)
    places = [tokens_of(*mark) for mark in DOCUMENTS]
    expected = sum(summed_loss(theirs(IDS[here][None]).logits, LABELS[here][None]) for here in places)
    loss = ours(IDS, POSITION_IDS, SEGMENT_IDS, LABELS.masked_fill(SEGMENT_IDS == 0, -100))
    assert_close(loss, expected, "loss")
    assert_gradients_close(gradients(ours, loss), gradients(theirs, expected))


@every_impl
@every_document
def test_documents_do_not_see_each_other(impl, row, segment):
    ours, _ = pair(GQA, impl)
    here = tokens_of(row, segment)
    changed = torch.where(here, IDS % 100 + 1, IDS)
    before, after = (ours(ids, POSITION_IDS, SEGMENT_IDS) for ids in (IDS, changed))
    assert not torch.isclose(before[here], after[here]).all(dim=-1).any()
    assert torch.equal(before[~here], after[~here])


def with_window(theirs, layers: list[int], window: int, length: int) -> None:
    """Give the reference's ``layers`` a mask of their own, made pair by pair."""
    sees = torch.tensor([[0 <= q - k < window for k in range(length)] for q in range(length)])
    additive = torch.zeros(length, length).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    for i in layers:
        theirs.model.layers[i].register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attention_mask": additive}), with_kwargs=True
        )


@every_impl
@pytest.mark.parametrize("kinds", ["sfs", "fsf", "sss", "fff"])
def test_sliding_and_full_layers(impl, kinds):
    names = {"s": "sliding_attention", "f": "full_attention"}
    plain = GQA.replace(num_hidden_layers=3)
    config = plain.replace(layer_types=[names[kind] for kind in kinds], sliding_window=4)
    theirs = reference_model(plain)
    ours = ours_from(theirs, config, impl)
    with_window(theirs, [i for i, kind in enumerate(kinds) if kind == "s"], 4, 12)
    ids, labels = random_ids(config, 2, 12), random_ids(config, 2, 12, seed=1)
    expected = theirs(ids).logits
    assert_close(ours(ids), expected, "logits")
    loss = ours(ids, shift_labels=labels)
    assert_gradients_close(gradients(ours, loss), gradients(theirs, summed_loss(expected, labels)))


class GrowingCache:
    """Keeps all keys and values."""

    def __init__(self) -> None:
        self.layers = {}

    def update(self, layer_idx, k_BTKH, v_BTKH):
        if layer_idx in self.layers:
            k, v = self.layers[layer_idx]
            k_BTKH, v_BTKH = torch.cat((k, k_BTKH), dim=1), torch.cat((v, v_BTKH), dim=1)
        self.layers[layer_idx] = k_BTKH, v_BTKH
        return k_BTKH, v_BTKH


@every_impl
@torch.no_grad()
def test_decoding_with_a_cache_equals_one_forward(impl):
    ours, theirs = pair(GQA, impl)
    ids, cache = random_ids(GQA, 2, 10), GrowingCache()
    parts = [ours(ids[:, :6], cache=cache)]
    for place in (torch.arange(6, 8), torch.arange(8, 9), torch.arange(9, 10)):
        parts.append(ours(ids[:, place], place[None], mask=Mask(q_index_T=place), cache=cache))
    assert_close(torch.cat(parts, dim=1), theirs(ids).logits)
