"""A forward pass looked into: the shape of what each module returns, and where attention looks.

Shape letters: L layers, B batch rows, T positions, D hidden_size, N query heads, K key/value heads, H head_dim, F
intermediate_size, V vocab_size, S key positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from gemma_xla.drawing import INK, RED, label, new_figure
from gemma_xla.errors import UserError
from gemma_xla.model.attention import attend
from gemma_xla.model.gemma import Gemma
from gemma_xla.model.layers import GemmaAttention, apply_rope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = dict[str, torch.Tensor]
_LETTERS = {
    **dict.fromkeys(("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"), "B T D"),
    **dict.fromkeys(("o_proj", "down_proj"), "B T D"),
    **dict.fromkeys(("gate_proj", "up_proj"), "B T F"),
    **dict.fromkeys(("k_proj", "v_proj"), "B T (K H)"),
    "q_proj": "B T (N H)",
}


class Step(NamedTuple):
    """What one module made of its input."""

    module: str
    letters: str
    shape: tuple[int, ...]
    parameters: int


@torch.no_grad()
def forward_steps(model: Gemma, batch: Batch, num_layers: int = 1) -> list[Step]:
    """Run a forward pass; return what its modules returned, in the order in which they did.

    Args:
        batch: arguments of the model, without labels.
        num_layers: of how many layers; all have the same shapes.
    """
    skipped = tuple(f"model.layers.{i}." for i in range(num_layers, model.config.num_hidden_layers))
    leaves = {name: m for name, m in model.named_modules() if not [*m.children()] and not name.startswith(skipped)}
    steps = []

    def note(name: str, module: nn.Module, out: torch.Tensor) -> None:
        count = sum(parameter.numel() for parameter in module.parameters())
        steps.append(Step(name, _LETTERS[name.rpartition(".")[2]], tuple(out.shape), count))

    with _hooked(leaves, lambda name, module: module.register_forward_hook(lambda m, _, out: note(name, m, out))):
        logits = model(**batch)
    return [*steps, Step("logits (weights: model.embed_tokens)", "B T V", tuple(logits.shape), 0)]


@torch.no_grad()
def attention_maps(model: Gemma, batch: Batch) -> torch.Tensor:
    """What each position makes its new values of: the weight of every position, ``[L, B, N, T, S]``; rows sum to 1.

    Args:
        batch: arguments of the model, without labels.
    """
    maps = []

    def look(module: GemmaAttention, args: tuple[Any, ...]) -> None:
        x_BTD, cos, sin, mask = args[:4]
        q_BTNH, k_BSKH = (
            apply_rope(proj(x_BTD).unflatten(-1, (-1, module.head_dim)), cos, sin)
            for proj in (module.q_proj, module.k_proj)
        )
        # Position number s has a one in place s and zeros elsewhere for its value: what comes out are the weights.
        B, S, K, _ = k_BSKH.shape
        unit_BSKS = torch.eye(S, dtype=x_BTD.dtype, device=x_BTD.device)[None, :, None].expand(B, S, K, S)
        out_BTNS = attend(q_BTNH, k_BSKH, unit_BSKS, mask, window=module.window, scale=module.scale, impl="reference")
        maps.append(out_BTNS.transpose(1, 2))

    attention = {name: m for name, m in model.named_modules() if isinstance(m, GemmaAttention)}
    with _hooked(attention, lambda _, module: module.register_forward_pre_hook(look)):
        model(**batch)
    return torch.stack(maps)


def draw_attention(
    maps_NTS: torch.Tensor, tokens: Sequence[str], segment_ids_T: Sequence[int], title: str = ""
) -> Figure:
    """The attention maps of one row, a square for each head; lines stand between documents.

    Args:
        maps_NTS: of one layer and one row, from `attention_maps`.
        tokens: how to call each position.
        segment_ids_T: the document that each position belongs to, 0 for padding.

    Raises:
        UserError: there are not as many tokens as positions.
    """
    num_heads, length = maps_NTS.shape[:2]
    if not len(tokens) == len(segment_ids_T) == length:
        raise UserError(
            f"tokens and segment_ids_T have {len(tokens)} and {len(segment_ids_T)} entries, but there are {length} "
            "positions; give one for each"
        )
    figure, (row,) = new_figure(0.6 + 4.0 * num_heads, 4.8, title, columns=num_heads)
    names = [token.replace("$", r"\$") for token in tokens]
    borders = [i - 0.5 for i in range(1, length) if segment_ids_T[i] != segment_ids_T[i - 1]]
    for head, axes in enumerate(row):
        image = axes.imshow(maps_NTS[head].float().cpu(), cmap="Blues", vmin=0.0, vmax=1.0)
        for border in borders:
            axes.axhline(border, color=RED, linewidth=0.8)
            axes.axvline(border, color=RED, linewidth=0.8)
        axes.spines[:].set_visible(True)
        axes.set_xticks(range(length), names, rotation=90, fontsize=6, color=INK)
        axes.set_yticks(range(length), names if head == 0 else [""] * length, fontsize=6, color=INK)
        label(axes, f"head {head}", "is looked at", "looks" if head == 0 else "")
    bar = figure.colorbar(image, ax=list(row), shrink=0.7)
    bar.ax.tick_params(colors=INK, labelsize=8)
    return figure


@contextmanager
def _hooked(modules: dict[str, nn.Module], register: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    handles = [register(name, module) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
