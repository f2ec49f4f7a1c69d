"""The architecture's numbers: published shapes, and errors that name the field."""

from __future__ import annotations

import dataclasses

import pytest

from gemma_xla.errors import UserError
from gemma_xla.model.config import PRESETS, GemmaConfig, preset
from tests.reference import reference_config

SIZES = [f.name for f in dataclasses.fields(GemmaConfig) if f.type in ("int", "float") and "token_id" not in f.name]
SLIDING = "sliding_attention"


# Gemma: Open Models Based on Gemini Research and Technology, arXiv:2403.08295, table 1. Its feed-forward size counts
# the gate and up projections together; intermediate_size is one of them.
@pytest.mark.parametrize(
    ("name", "hidden", "layers", "feed_forward", "heads", "kv_heads"),
    [("gemma-2b", 2048, 18, 32768, 8, 1), ("gemma-7b", 3072, 28, 49152, 16, 16)],
)
def test_presets_have_the_published_shapes(name, hidden, layers, feed_forward, heads, kv_heads):
    config = preset(name)
    assert (config.hidden_size, config.num_hidden_layers) == (hidden, layers)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, kv_heads, 256)
    assert 2 * config.intermediate_size == feed_forward
    assert (config.vocab_size, config.max_position_embeddings) == (256000, 8192)


def test_the_7b_preset_is_the_default_of_the_reference():
    import transformers

    ours, default = reference_config(preset("gemma-7b")).to_dict(), transformers.GemmaConfig().to_dict()
    names = {f.name for f in dataclasses.fields(GemmaConfig)} & default.keys() | {"rope_parameters"}
    assert len(names) >= 14
    assert {name: ours[name] for name in names} == {name: default[name] for name in names}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_see_everything_before_them(name):
    config = preset(name)
    assert [config.window(i) for i in range(config.num_hidden_layers)] == [None] * config.num_hidden_layers


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"model\.preset: no preset 'gema-2b' \(did you mean 'gemma-2b'\?\)"):
        preset("gema-2b")


BAD = [
    *(({name: value}, [name, str(value)]) for name in SIZES for value in (0, -1, float("nan"))),
    ({"head_dim": 17}, ["head_dim", "17", "even"]),
    ({"num_attention_heads": 8, "num_key_value_heads": 3}, ["num_attention_heads", "8", "num_key_value_heads", "3"]),
    ({"num_attention_heads": 2, "num_key_value_heads": 4}, ["num_attention_heads", "2", "num_key_value_heads", "4"]),
    ({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, ["layer_types", "1", "num_hidden_layers", "2"]),
    ({"num_hidden_layers": 1, "layer_types": ["full"]}, ["layer_types", "'full'", "full_attention", SLIDING]),
    ({"num_hidden_layers": 1, "layer_types": [SLIDING]}, ["layer_types", "sliding_window"]),
    ({"num_hidden_layers": 1, "layer_types": [SLIDING], "sliding_window": 0}, ["layer_types", "sliding_window"]),
    ({"num_hidden_layers": 1, "layer_types": [SLIDING], "sliding_window": -3}, ["layer_types", "sliding_window"]),
]


@pytest.mark.parametrize(("fields", "named"), BAD, ids=lambda value: "-".join(map(str, value)))
def test_a_bad_value_names_its_field(fields, named):
    for make in (GemmaConfig, GemmaConfig().replace):
        with pytest.raises(UserError, match="^model: ") as error:
            make(**fields)
        for word in named:
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("hidden_size", "48", "int"), ("hidden_size", 48.0, "int"), ("num_hidden_layers", True, "int")]
    + [("rope_theta", "1e4", "float"), ("rms_norm_eps", None, "float"), ("vocab_size", [1], "int")],
)
def test_replace_refuses_a_value_of_another_type(name, value, kind):
    with pytest.raises(UserError) as error:
        GemmaConfig().replace(**{name: value})
    assert f"model: {name} is {value!r}; it must be of type {kind}" == str(error.value)


@pytest.mark.parametrize(("typo", "field"), [("hiden_size", "hidden_size"), ("num_layers", "num_hidden_layers")])
def test_replace_names_the_nearest_field(typo, field):
    with pytest.raises(UserError) as error:
        GemmaConfig().replace(**{typo: 1})
    assert str(error.value) == f"model: unknown field '{typo}' (did you mean '{field}'?)"


def test_replace_changes_what_it_names_and_nothing_else():
    config = GemmaConfig()
    changed = config.replace(rope_theta=10, num_hidden_layers=3)
    expected = dataclasses.asdict(config) | {"rope_theta": 10, "num_hidden_layers": 3}
    assert dataclasses.asdict(changed) == expected
    assert config == GemmaConfig()


def test_windows_follow_the_layer_types():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = GemmaConfig(num_hidden_layers=3, layer_types=kinds, sliding_window=7)
    assert [config.window(i) for i in range(3)] == [7, None, 7]
    # A list would make the config unhashable.
    assert hash(config) == hash(GemmaConfig(num_hidden_layers=3, layer_types=tuple(kinds), sliding_window=7))
