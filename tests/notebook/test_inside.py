"""A forward pass looked into: shapes are those of the modules, maps are what attention does."""

from __future__ import annotations

import pytest
import torch

from gemma_xla.errors import UserError
from gemma_xla.model.config import preset
from gemma_xla.model.gemma import Gemma
from gemma_xla.notebook.inside import attention_maps, draw_attention, forward_steps

SEGMENTS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 2]])


@pytest.fixture
def model() -> Gemma:
    torch.manual_seed(0)
    layers = {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 3}
    return Gemma(preset("gemma-test").replace(**layers))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 512, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "segment_ids": SEGMENTS}


def test_maps_are_the_weights_with_which_values_are_mixed(model, batch):
    seen = []
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.v_proj.register_forward_hook(lambda _, __, out: seen.append(out))
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    maps = attention_maps(model, batch)
    assert maps.shape == (2, 2, 4, 8, 8)
    for layer in range(2):
        values_BSKH, mixed_BTNH = seen[2 * layer].unflatten(-1, (2, 16)), seen[2 * layer + 1].unflatten(-1, (4, 16))
        # Two query heads share each head of values.
        values_BSNH = values_BSKH.repeat_interleave(2, dim=2)
        expected = torch.einsum("bnts,bsnh->btnh", maps[layer], values_BSNH)
        torch.testing.assert_close(expected, mixed_BTNH, atol=1e-5, rtol=0)


def test_maps_stay_in_the_document_the_past_and_the_window(model, batch):
    maps = attention_maps(model, batch)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 4, 8))
    place = torch.arange(8)
    past = (place[:, None] >= place)[None, None]
    same = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])[:, None]
    near = place[:, None] - place < 3
    for layer, visible in enumerate((past & same, past & same & near)):
        assert torch.all((maps[layer] > 0) == visible.expand(2, 4, 8, 8))


def test_a_look_changes_nothing(model, batch):
    expected = model(**batch)
    attention_maps(model, batch)
    forward_steps(model, batch)
    assert torch.equal(model(**batch), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_steps_are_in_order_with_the_shapes_that_their_letters_say(model, batch):
    steps = forward_steps(model, batch)
    config, T = model.config, 8
    widths = {"D": config.hidden_size, "(N H)": 4 * 16, "(K H)": 2 * 16, "F": config.intermediate_size, "V": 512}
    assert all(step.shape == (2, T, widths[step.letters.removeprefix("B T ")]) for step in steps)
    names = [step.module.rpartition(".")[2] for step in steps]
    layer = ["input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"]
    layer += ["post_attention_layernorm", "gate_proj", "up_proj", "down_proj"]
    assert names[:-1] == ["embed_tokens", *layer, "norm"]
    assert steps[-1].module.startswith("logits")
    both = forward_steps(model, batch, num_layers=2)
    assert sum(step.parameters for step in both) == sum(p.numel() for p in model.parameters())


def test_the_picture_has_a_square_for_each_head_and_lines_between_documents(model, batch):
    maps = attention_maps(model, batch)
    tokens = [*"abcdefg", "$x$_{"]
    figure = draw_attention(maps[0, 0], tokens, SEGMENTS[0].tolist(), "a layer")
    figure.canvas.draw()
    heads = figure.axes[:4]
    assert [axes.get_title(loc="left") for axes in heads] == [f"head {i}" for i in range(4)]
    # Before positions 4 and 7, across and down.
    assert sorted(line.get_xdata()[0] for line in heads[0].lines if line.get_xdata()[0] > 1) == [3.5, 6.5]
    assert len(heads[0].lines) == 4
    with pytest.raises(UserError, match="7 and 8 entries, but there are 8 positions"):
        draw_attention(maps[0, 0], tokens[1:], SEGMENTS[0].tolist())
