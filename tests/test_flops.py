"""The FLOP counter against published figures, PyTorch's operation counter, brute force, transformers and peft."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GemmaConfig as HFGemmaConfig
from transformers import GemmaForCausalLM

from gemma_xla.errors import UserError
from gemma_xla.flops import LORA_TARGETS, FlopCounter, num_parameters, report, table, visible_pairs
from gemma_xla.model.config import GemmaConfig, preset

SHAPES = {
    "grouped": preset("gemma-test"),
    "multi-query": preset("gemma-test").replace(num_key_value_heads=1),
    "multi-head": preset("gemma-test").replace(num_key_value_heads=4, num_hidden_layers=3),
    "wide heads": preset("gemma-test").replace(hidden_size=40, head_dim=32, intermediate_size=56, vocab_size=72),
}
BATCH, TOKENS = 2, 24


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim", "max_position_embeddings"]


def hf_model(config: GemmaConfig) -> GemmaForCausalLM:
    fields = {name: getattr(config, name) for name in SIZES}
    return GemmaForCausalLM(HFGemmaConfig(**fields, attn_implementation="eager", tie_word_embeddings=True))


def measured_flops(model: torch.nn.Module, vocab_size: int, backward: bool) -> int:
    """FLOPs that PyTorch's dispatcher sees for BATCH sequences of TOKENS tokens."""
    input_ids = torch.randint(vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=input_ids, use_cache=False).logits.sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "published"), [("gemma-2b", 2_506_172_416), ("gemma-7b", 8_537_680_896)])
def test_parameters_equal_those_published_and_of_transformers(name, published):
    with torch.device("meta"):
        model = hf_model(preset(name))
    model.tie_weights()
    assert num_parameters(preset(name)) == published == sum(p.numel() for p in model.parameters())


def test_2b_cross_check_in_tflop_per_training_sequence():
    counter = FlopCounter(GemmaConfig(vocab_size=256128), 8192)
    attention = next(term.training for term in counter.terms() if term.name == "attention")
    total = counter.per_sequence()
    assert round(total / 1e12, 2) == 138.04
    assert round((total - attention) / 1e12, 2) == 123.19
    # T (T + 1) / 2 pairs would round to 14.85: the published figure is that of T^2 / 2.
    assert round(attention / 1e12, 2) == 14.84
    assert counter.per_sequence(causal=False) == total + attention


def test_7b_by_hand():
    layer = 4 * 3072 * 16 * 256 + 3 * 3072 * 24576
    weights = 28 * layer + 3072 * 256000
    attention = 28 * 2 * (2 * 16 * 256 * 8192**2 // 2)
    assert FlopCounter(preset("gemma-7b"), 8192).per_sequence() == 3 * (2 * weights * 8192 + attention)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_operations_of_transformers(config, training):
    # The eager model computes the whole square of the scores. Nothing else differs: its embedding is trained, so even
    # the first layer has an input gradient, and its rotary embeddings are outer products done without a matmul.
    counted = FlopCounter(config, TOKENS).per_step(BATCH, training=training, causal=False)
    assert counted == measured_flops(hf_model(config), config.vocab_size, training)


def unneeded_gradients(config: GemmaConfig, rank: int, targets: tuple[str, ...]) -> int:
    """FLOPs of the input gradients that the counter counts and autograd skips: those of the first layer's start.

    Nothing below the first adapter is trained, so no gradient flows into the first layer's q, k and v projections: not
    through the frozen weights, nor through their adapters' A. A key without an adapter needs no gradient either.
    """
    tokens, keys = BATCH * TOKENS, config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    frozen = 2 * tokens * config.hidden_size * (queries + 2 * keys)
    adapters = 2 * tokens * config.hidden_size * rank * len({"q_proj", "k_proj", "v_proj"} & set(targets))
    key_gradient = 0 if "k_proj" in targets else 2 * BATCH * queries * TOKENS**2
    return frozen + adapters + key_gradient


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("q_proj", "v_proj"), ("q_proj", "v_proj", "down_proj")])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_lora_equals_the_operations_of_peft(config, targets):
    rank = 3
    model = get_peft_model(hf_model(config), LoraConfig(r=rank, target_modules=list(targets)))
    counter = FlopCounter(config, TOKENS, lora_rank=rank, lora_targets=targets)
    assert counter.num_trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert counter.per_step(BATCH, training=False, causal=False) == measured_flops(model, config.vocab_size, False)
    done = measured_flops(model, config.vocab_size, True)
    assert counter.per_step(BATCH, causal=False) == done + unneeded_gradients(config, rank, targets)


def test_frozen_weights_cost_two_thirds_and_attention_the_same():
    full = {term.name: term for term in FlopCounter(preset("gemma-2b"), 8192).terms()}
    lora = {term.name: term for term in FlopCounter(preset("gemma-2b"), 8192, lora_rank=16).terms()}
    adapters = lora.pop("adapters")
    # Each layer: rank x (in + out) of q, k, v, o, gate, up and down.
    sizes = (2048 + 2048) + 2 * (2048 + 256) + (2048 + 2048) + 3 * (2048 + 16384)
    assert (adapters.forward, adapters.training) == (2 * 8192 * 18 * 16 * sizes, 6 * 8192 * 18 * 16 * sizes)
    assert lora.pop("attention") == full.pop("attention")
    assert lora.keys() == full.keys()
    for name in full:
        assert 3 * lora[name].training == 2 * full[name].training
        assert lora[name].forward == full[name].forward


@pytest.mark.parametrize("window", [None, 1, 2, 7, 39, 40, 41, 100])
def test_visible_pairs_against_counting(window):
    tokens = 40
    positions = torch.arange(tokens)
    distance = positions[:, None] - positions[None, :]
    mask = (distance >= 0) & (distance < (window or tokens))
    # The area takes half of each pair that ends a growing row.
    assert visible_pairs(tokens, window) == mask.sum().item() - min(window or tokens, tokens) / 2


def test_sliding_layers_count_their_window():
    layers = ("sliding_attention", "full_attention")
    config = preset("gemma-test").replace(sliding_window=16, layer_types=layers)
    counter = FlopCounter(config, 64)
    attention = next(term.forward for term in counter.terms() if term.name == "attention")
    sliding = 16 * 64 - 16**2 // 2
    assert attention == 4 * 4 * 16 * (sliding + 64**2 // 2)
    assert counter.per_sequence(causal=False) == FlopCounter(preset("gemma-test"), 64).per_sequence(causal=False)


def test_per_token_and_mfu():
    counter = FlopCounter(preset("gemma-2b"), 8192)
    assert counter.per_token() * 8192 == counter.per_sequence()
    # One sequence per second on a chip that does twice that.
    assert counter.mfu(8192, 2 * counter.per_sequence()) == pytest.approx(0.5, rel=1e-12)
    full = counter.mfu(8192, 2 * counter.per_sequence(), causal=False)
    assert full == pytest.approx(counter.per_sequence(causal=False) / counter.per_sequence() / 2, rel=1e-12)


def test_report_is_json_and_adds_up():
    counter = FlopCounter(preset("gemma-7b"), 4096, lora_rank=8)
    figures = json.loads(json.dumps(report(counter)))
    for kind in ("forward", "training"):
        assert sum(term[kind] for term in figures["terms"].values()) == figures["per_sequence"]["causal"][kind]
    assert figures["per_token"]["full_square"]["training"] == counter.per_token(causal=False)
    assert figures["parameters"]["trainable"] == figures["parameters"]["adapters"] > 0


def test_table_names_every_term_and_the_total():
    counter = FlopCounter(GemmaConfig(vocab_size=256128), 8192)
    text = table(counter)
    rows = {line[:20].strip(): line[20:].split() for line in text.splitlines()}
    assert rows["TFLOP per sequence"] == ["forward", "training", "share"]
    assert rows["total, causal"] == ["46.012", "138.036", "100.0%"]
    assert rows["attention"] == ["4.948", "14.843", "10.8%"]
    assert all(term.name in rows for term in counter.terms())
    assert "MFLOP" in table(FlopCounter(preset("gemma-test"), 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0; it must be from 1 to max_position_embeddings (256)"),
        ({"seq_len": 257}, "seq_len is 257; it must be from 1 to max_position_embeddings (256)"),
        ({"seq_len": 8, "lora_rank": 0}, "lora_rank is 0; it must be greater than 0, or absent for full training"),
        (
            {"seq_len": 8, "lora_rank": 4, "lora_targets": ("q_proj", "up_pro")},
            "lora_targets: no module 'up_pro' (did you mean 'up_proj'?); there are q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj",
        ),
    ],
)
def test_impossible_values_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        FlopCounter(preset("gemma-test"), **arguments)
    assert str(error.value) == message
