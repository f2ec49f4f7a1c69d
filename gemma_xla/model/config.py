"""The architecture's numbers, under the names Hugging Face's ``config.json`` uses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gemma_xla.errors import UserError, nearest

# The modules of a layer that hold matrices; an adapter can stand beside each.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The results of a layer's matrix products that a backward pass needs: beside them and the layer's input, only cheap
# things have to be computed again. "attention" is what comes out of it, with the kernel's log-sum-exp.
ACTIVATIONS = ("q_proj", "k_proj", "v_proj", "attention", "o_proj", "gate_proj", "up_proj")
# The three products of a linear layer and its backward pass.
INT8_PRODUCTS = ("output", "grad_input", "grad_weight")


@dataclass(frozen=True)
class GemmaConfig:
    """Shape of a Gemma decoder. Field names and meanings equal those of ``transformers.GemmaConfig``.

    ``head_dim`` is a field of its own: for Gemma 7B, ``num_attention_heads * head_dim`` is not ``hidden_size``.

    Raises:
        UserError: a size is not positive, ``head_dim`` is odd (rotary embeddings turn pairs), or the query heads
            cannot be shared out evenly among the key/value heads; a value is of another type.
    """

    vocab_size: int = 256000
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    # A layer whose type is "sliding_attention" sees only the last `sliding_window` positions; None means all layers
    # see everything before them, as in Gemma 1.
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2

    def __post_init__(self) -> None:
        self._check_types()
        for name in _POSITIVE:
            value = getattr(self, name)
            # Sizes that a 32-bit integer holds, numbers that a float32 does.
            limit = 3e38 if isinstance(type(self).__dataclass_fields__[name].default, float) else 2**31
            if not 0 < value < limit:
                raise UserError(f"model: {name} is {value}; it must be greater than 0 and less than {limit}")
        for name in _TOKEN_IDS:
            value = getattr(self, name)
            if not 0 <= value < self.vocab_size:
                raise UserError(f"model: {name} is {value}; it must be a token id below vocab_size ({self.vocab_size})")
        if self.head_dim % 2:
            raise UserError(f"model: head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model: num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}); make it one"
            )
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            self._check_layer_types(self.layer_types)
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise UserError(f"model: sliding_window is {self.sliding_window}; it must be greater than 0, or absent")

    def _check_types(self) -> None:
        for name in (*_POSITIVE, *_TOKEN_IDS, "sliding_window"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value is None and default is None:
                continue
            kinds = (int, float) if isinstance(default, float) else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise UserError(f"model: {name} is {value!r}; it must be of type {kinds[-1].__name__}")
        if self.layer_types is not None and not isinstance(self.layer_types, (list, tuple)):
            raise UserError(f"model: layer_types is {self.layer_types!r}; it must be a list, one entry for each layer")

    def _check_layer_types(self, layer_types: tuple[str, ...]) -> None:
        if len(layer_types) != self.num_hidden_layers:
            raise UserError(
                f"model: layer_types names {len(layer_types)} layers but num_hidden_layers is {self.num_hidden_layers}"
            )
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(
                    f"model: layer_types has {kind!r}; it may hold 'full_attention' and 'sliding_attention'"
                )
        if "sliding_attention" in layer_types and not (self.sliding_window or 0) > 0:
            raise UserError("model: layer_types has sliding layers; set sliding_window to their width in tokens")

    def window(self, layer_idx: int) -> int | None:
        """Positions that layer ``layer_idx`` sees, itself included; None: everything before it."""
        if self.layer_types is None or self.layer_types[layer_idx] == "full_attention":
            return None
        return self.sliding_window

    def replace(self, **overrides: Any) -> GemmaConfig:
        """Return a copy with the given fields changed.

        Raises:
            UserError: a name is not a field, or its value is impossible.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in fields:
                hint = nearest(name, fields) or f"; there are {', '.join(fields)}"
                raise UserError(f"model: unknown field {name!r}{hint}")
        return dataclasses.replace(self, **overrides)


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
)
_TOKEN_IDS = ("pad_token_id", "eos_token_id", "bos_token_id")

PRESETS: dict[str, GemmaConfig] = {
    # Gemma: Open Models Based on Gemini Research and Technology, arXiv:2403.08295, table 1.
    "gemma-2b": GemmaConfig(),
    "gemma-7b": GemmaConfig(
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
    ),
    # For tests: as small as it gets with every mechanism in play (grouped heads, heads * head_dim != hidden_size).
    "gemma-test": GemmaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    ),
    # The quickstart's model: 5.6M parameters, learns in minutes on two cores.
    "gemma-tiny": GemmaConfig(
        vocab_size=768,
        hidden_size=320,
        intermediate_size=1280,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        # Narrow layers want larger weights: about hidden_size ** -0.5.
        initializer_range=0.05,
    ),
    # For benchmarks: about 60M parameters.
    "gemma-small": GemmaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=2048,
    ),
}


def preset(name: str) -> GemmaConfig:
    """Return the preset called ``name``.

    Raises:
        UserError: there is none of that name.
    """
    if name not in PRESETS:
        raise UserError(f"model.preset: no preset {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def splash_takes(head_dim: int, positions: int) -> bool:
    """Whether the attention kernel for TPUs takes rows of so many positions: whole vectors alone, of 128 values."""
    return head_dim % 128 == 0 and positions % 128 == 0


def heads_first_takes(head_dim: int) -> bool:
    """Whether the kernel for TPUs that turns heads and moves them takes such heads, of rows that `splash_takes`.

    Of 256 values, as Gemma's: their halves are whole vectors, and their scale for attention is a power of two.
    """
    return head_dim == 256
