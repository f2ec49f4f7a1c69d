"""Generation against `transformers`' own, the cache against the full pass, sampling against its definition."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemma_xla.errors import UserError
from gemma_xla.infer import KVCache, generate, generate_steps
from gemma_xla.infer.sampling import Sampling, next_token
from gemma_xla.model.attention import Mask
from tests.reference import IMPLS, SHAPES, assert_close, ours_from, random_ids, reference_model

GQA = SHAPES["gqa-16"]
PROMPTS = [[2, 17, 5], [2], [2, 9, 8, 7, 6, 5, 4, 3, 90, 11, 50, 60, 70, 80, 99, 31, 32, 33, 34]]
GAINS = {"q_proj": 8.0, "o_proj": 40.0, "down_proj": 10.0}
greedy = functools.partial(generate, max_new_tokens=40, eos_token_id=[])


def lively_pair(config, impl: str = "sdpa", seed: int = 0):
    """Models whose layers outweigh the embedding: with tied weights, others repeat the last token for ever."""
    theirs = reference_model(config, seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.mul_(next((gain for end, gain in GAINS.items() if end in name), 1.0))
    return ours_from(theirs, config, impl), theirs


@pytest.fixture(scope="module")
def model():
    return lively_pair(GQA)[0]


def reference_tokens(theirs, prompts: list[list[int]], **options) -> list[list[int]]:
    """The continuations `transformers` generates greedily, prompts padded on the left to the longest."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, **options}
    return theirs.generate(ids, attention_mask=mask, do_sample=False, **options)[:, longest:].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_greedy_tokens_equal_transformers(shape, impl):
    ours, theirs = lively_pair(SHAPES[shape], impl)
    expected = reference_tokens(theirs, PROMPTS)
    assert min(len(set(row)) for row in expected) > 15  # not one token over and over
    assert greedy(ours, PROMPTS) == expected
    for prompt, row in zip(PROMPTS, expected, strict=True):
        assert greedy(ours, [prompt]) == reference_tokens(theirs, [prompt]) == [row]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layer_types", [None, ("sliding_attention", "full_attention")])
def test_cached_logits_equal_the_full_pass(impl, layer_types):
    config = dataclasses.replace(GQA, sliding_window=3, layer_types=layer_types)
    ours = ours_from(reference_model(GQA), config, impl)
    ids = random_ids(GQA, 2, 12)
    full = ours(ids)
    cache, seen = KVCache(16), torch.ones(2, 16, dtype=torch.long)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
        cache.index_T = torch.arange(start, stop)
        part = ours(ids[:, start:stop], torch.arange(start, stop)[None], mask=Mask(seen, cache.index_T), cache=cache)
        assert_close(part, full[:, start:stop])


def test_a_prompt_of_exactly_a_bucket_and_one_more(model):
    for length in (15, 16, 17, 32, 33):
        prompt = random_ids(GQA, length, seed=length).tolist()
        ids = list(prompt)
        for _ in range(8):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        assert greedy(model, [prompt], max_new_tokens=8) == [ids[length:]]


def test_shapes_are_those_of_two_programs(model, monkeypatch):
    shapes, positions, forward = [], [], model.model.forward

    def record(ids, position_ids, mask, cache):
        assert not torch.is_grad_enabled()
        shapes.append((tuple(ids.shape), tuple(mask.segment_ids_BS.shape), tuple(mask.q_index_T.shape)))
        positions.append(position_ids.tolist())
        return forward(ids, position_ids, mask, cache)

    monkeypatch.setattr(model.model, "forward", record)
    for lengths in ((17, 3), (25, 4), (32, 1)):
        positions.clear()
        greedy(model, [[5] * length for length in lengths], max_new_tokens=6)
        # Each row counts from its own first token.
        prefill = [[0] * (32 - length) + list(range(length)) for length in lengths]
        assert positions == [prefill, *([[length + step] for length in lengths] for step in range(5))]
    assert set(shapes) == {((2, 32), (2, 38), (32,)), ((2, 1), (2, 38), (1,))}


def test_stops_at_end_of_sequence():
    ours, theirs = lively_pair(GQA)
    free = greedy(ours, PROMPTS)
    first, second = free[0][6], free[2][11]
    expected = [_until(row, {first, second}) for row in free]
    assert len(expected[0]) < 40 and len(expected[2]) < 40
    assert greedy(ours, PROMPTS, eos_token_id=[first, second]) == expected
    padded = reference_tokens(theirs, PROMPTS, eos_token_id=[first, second])
    assert padded == [row + [0] * (len(padded[0]) - len(row)) for row in expected]
    # One id, and the config's own.
    assert greedy(ours, PROMPTS, eos_token_id=first) == [_until(row, {first}) for row in free]
    ours.config = ours.config.replace(eos_token_id=first)
    assert greedy(ours, PROMPTS, eos_token_id=None) == [_until(row, {first}) for row in free]


def _until(row: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: stop + 1]


def test_steps_come_one_by_one(model):
    expected = greedy(model, PROMPTS)
    end = expected[0][2]
    synced = []
    steps = generate_steps(
        model, PROMPTS, max_new_tokens=40, eos_token_id=end, sync=lambda: synced.append(torch.is_grad_enabled())
    )
    seen = []
    for step in steps:
        seen.append(step)
        assert len(synced) == len(seen)
        assert torch.is_grad_enabled()  # nothing leaks out of a suspended generator
        if len(seen) == 4:
            break
    assert [row[0] for row in seen] == [*_until(expected[0], {end}), None, None, None][:4]
    assert [row[2] for row in seen] == expected[2][:4]


def test_cache_follows_the_compute_dtype(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = greedy(model, PROMPTS, max_new_tokens=4)
    cast = lively_pair(GQA)[0].to(torch.bfloat16)
    assert [len(row) for row in mixed] == [len(row) for row in greedy(cast, PROMPTS, max_new_tokens=4)] == [4, 4, 4]


def test_sampling_is_decided_by_the_seed(model):
    draw = functools.partial(greedy, model, PROMPTS, temperature=1.5)
    assert draw(seed=3) == draw(seed=3)
    assert draw(seed=3) != draw(seed=4)
    state = torch.get_rng_state()
    draw(seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(model):
    expected = greedy(model, PROMPTS)
    assert greedy(model, PROMPTS, temperature=2.0, top_k=1) == expected
    assert greedy(model, PROMPTS, temperature=2.0, top_p=1e-6) == expected
    tied = torch.randint(0, 3, (1, 5000), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(next_token(tied, torch.tensor([0.99]), Sampling(1.0, top_k=1)), tied.argmax(-1))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.3, 0.2]),
        (Sampling(0.5), [0.01 / 0.3, 0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3]),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 3 / 7, 0]),
        (Sampling(1.0, top_k=99), [0.1, 0.4, 0.3, 0.2]),
        (Sampling(1.0, top_p=0.39), [0, 1, 0, 0]),
        (Sampling(1.0, top_p=0.69), [0, 4 / 7, 3 / 7, 0]),
        (Sampling(1.0, top_p=0.71), [0, 4 / 9, 3 / 9, 2 / 9]),
        (Sampling(1.0, top_p=1.0), [0.1, 0.4, 0.3, 0.2]),
        # Of the two left, 4/7 and 3/7, the first alone reaches 0.55.
        (Sampling(1.0, top_k=2, top_p=0.55), [0, 1, 0, 0]),
    ],
)
def test_each_token_gets_its_share_of_the_draws(sampling, expected):
    n = 20000
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().expand(n, 4)
    evenly = torch.arange(n) / n
    share = torch.bincount(next_token(logits, evenly, sampling), minlength=4) / n
    assert torch.allclose(share, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2 / n)


def test_sampling_filters_as_transformers_does():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warp = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(12), TopPLogitsWarper(0.8)])
    logits = torch.randn(50, 101, generator=torch.Generator().manual_seed(0))
    kept = warp(None, logits).isfinite()
    reached = torch.zeros_like(kept)
    for u in torch.arange(0, 1, 0.002):
        tokens = next_token(logits, torch.full((50,), u.item()), Sampling(0.8, top_k=12, top_p=0.8))
        reached[torch.arange(50), tokens] = True
    assert torch.equal(reached, kept)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([[2], []], {}, "no tokens"),
        ([[2, 101]], {}, "token id 101 is not in the vocabulary of 101"),
        ([[-1]], {}, "token id -1"),
        ([[2] * 30], {"max_new_tokens": 35}, "30 tokens and max_new_tokens (35) exceed"),
        ([[2]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[2]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[2]], {"temperature": float("nan")}, "temperature is nan"),
        ([[2]], {"top_k": 0}, "top_k is 0"),
        ([[2]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[2]], {"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_impossible_requests_are_explained(model, prompts, options, message):
    with pytest.raises(UserError) as error:
        generate(model, prompts, **{"max_new_tokens": 4, **options})
    assert message in str(error.value)


def test_the_last_position_may_be_used(model):
    assert len(greedy(model, [[2] * 30], max_new_tokens=34)[0]) == 34


def test_every_layer_keeps_its_own_keys():
    config = dataclasses.replace(GQA, num_hidden_layers=3)
    ours, theirs = lively_pair(config, seed=5)
    assert greedy(ours, PROMPTS) == reference_tokens(theirs, PROMPTS)


XLA_SCRIPT = """
import torch_xla
import torch_xla.debug.metrics as metrics
from tests.test_generate import GQA, PROMPTS, greedy, lively_pair

model = lively_pair(GQA)[0]
options = {"max_new_tokens": 8, "sync": torch_xla.sync}
draw = {"temperature": 1.5, "top_k": 40, "top_p": 0.9}
expected = [greedy(model, PROMPTS, **options), greedy(model, PROMPTS, **options, **draw)]
model = model.to(torch_xla.device())
torch_xla.sync()
counts = [metrics.metric_data("CompileTime")[0] if metrics.metric_data("CompileTime") else 0]
for _ in range(2):
    assert greedy(model, PROMPTS, **options) == expected[0]
    assert greedy(model, PROMPTS, **options, **draw) == expected[1]
    counts.append(metrics.metric_data("CompileTime")[0])
assert counts[1] - counts[0] == 4  # prefill and decode, greedy and drawn
assert counts[2] == counts[1]
"""


@pytest.mark.xla
def test_xla_gives_the_same_tokens_and_compiles_each_shape_once():
    environment = os.environ | {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", XLA_SCRIPT], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
