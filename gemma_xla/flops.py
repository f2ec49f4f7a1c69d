"""The one FLOP counter: every MFU, EMFU, cost and plan figure comes from here.

Convention (PaLM, arXiv:2204.02311, appendix B, made exact for Gemma). A matmul of [m, k] by [k, n] is 2 m n k FLOPs in
the forward pass and twice that in the backward pass (one matmul for each operand's gradient):

- Weights: the seven projections of each layer and the output head, which shares the embedding's table and is counted
  once. The embedding lookup, norms, rotary embeddings, softmax, loss, optimizer and rematerialisation are not counted.
- Attention scores and values: causally by default. A query at position x is taken to see x keys and no more than the
  window, the area under the mask: T^2 / 2 for T tokens, W T - W^2 / 2 with a window of W. (Counting the diagonal whole,
  T (T + 1) / 2, differs by 1 / T: 14.85 instead of 14.84 TFLOP for Gemma 2B at 8192 tokens.) `causal=False` counts the
  whole square T^2 in every layer, as tables published before mid-2025 do. Rows are counted as one document: packing
  several into a row makes some of the counted pairs invisible.
- LoRA (arXiv:2106.09685): a frozen weight needs no weight gradient, so its training factor is 2 instead of 3. The input
  gradient of every frozen matmul is counted, although nothing below the first layer's first adapter needs one.
  Attention has no weights and keeps its factor of 3; the adapters' two matmuls are trained and count in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_xla.errors import UserError, nearest
from gemma_xla.model.config import LORA_TARGETS

if TYPE_CHECKING:
    from gemma_xla.config import LoraSection
    from gemma_xla.model.config import GemmaConfig

_UNITS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))


@dataclass(frozen=True)
class Term:
    """FLOPs of one kind of matmul in all layers, for one sequence."""

    name: str
    forward: int
    training: int


@dataclass(frozen=True)
class FlopCounter:
    """Counts model FLOPs; `lora_rank` None means that all weights are trained.

    Raises:
        UserError: the sequence is empty or longer than the model's positions, the rank is not positive, or a LoRA
            target is not one of `LORA_TARGETS`.
    """

    config: GemmaConfig
    seq_len: int
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        limit = self.config.max_position_embeddings
        if not 0 < self.seq_len <= limit:
            raise UserError(f"seq_len is {self.seq_len}; it must be from 1 to max_position_embeddings ({limit})")
        if self.lora_rank is not None and not self.lora_rank > 0:
            raise UserError(f"lora_rank is {self.lora_rank}; it must be greater than 0, or absent for full training")
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for name in self.lora_targets:
            if name not in LORA_TARGETS:
                hint = nearest(name, LORA_TARGETS)
                raise UserError(f"lora_targets: no module {name!r}{hint}; there are {', '.join(LORA_TARGETS)}")

    @classmethod
    def of_run(cls, model: GemmaConfig, seq_len: int, lora: LoraSection | None) -> FlopCounter:
        """The counter of a run whose config has this section ``lora``."""
        return cls(model, seq_len) if lora is None else cls(model, seq_len, lora.rank, tuple(lora.target_modules))

    def terms(self, causal: bool = True) -> list[Term]:
        """Return what each kind of matmul costs per sequence."""
        config, tokens = self.config, self.seq_len
        weights = {name: config.num_hidden_layers * m * n for name, (m, n) in projections(config).items()}
        weights["lm_head"] = config.hidden_size * config.vocab_size
        factor = 3 if self.lora_rank is None else 2
        terms = [Term(name, 2 * tokens * size, factor * 2 * tokens * size) for name, size in weights.items()]
        attention = self._attention(causal)
        terms.append(Term("attention", attention, 3 * attention))
        if self.lora_rank is not None:
            adapters = 2 * tokens * self.num_adapter_parameters
            terms.append(Term("adapters", adapters, 3 * adapters))
        return terms

    def per_sequence(self, training: bool = True, causal: bool = True) -> int:
        """FLOPs of one sequence of `seq_len` tokens: forward and backward, or forward only."""
        return sum(term.training if training else term.forward for term in self.terms(causal))

    def per_token(self, training: bool = True, causal: bool = True) -> float:
        """FLOPs of one token, averaged over the sequence."""
        return self.per_sequence(training, causal) / self.seq_len

    def per_step(self, num_sequences: int, training: bool = True, causal: bool = True) -> int:
        """FLOPs of a step over `num_sequences` sequences, on all chips together."""
        return num_sequences * self.per_sequence(training, causal)

    def mfu(self, tokens_per_second: float, peak_flops: float, causal: bool = True) -> float:
        """Model FLOPs utilisation of a training run, as a fraction of `peak_flops` (FLOP/s in bfloat16).

        Both arguments are of one chip, or both of all chips together. With int8 matmuls and the same bfloat16 peak, the
        result is the effective MFU (EMFU), which may exceed 1. Count all tokens for the speed of the hardware, real
        tokens (no padding) for the speed of learning.
        """
        return tokens_per_second * self.per_token(causal=causal) / peak_flops

    @property
    def num_adapter_parameters(self) -> int:
        """Parameters of the LoRA matrices A [rank, in] and B [out, rank]; 0 without LoRA."""
        shapes = [shape for name, shape in projections(self.config).items() if name in self.lora_targets]
        return self.config.num_hidden_layers * (self.lora_rank or 0) * sum(m + n for m, n in shapes)

    @property
    def num_trainable_parameters(self) -> int:
        """The adapters' parameters with LoRA, the model's without."""
        return num_parameters(self.config) if self.lora_rank is None else self.num_adapter_parameters

    def _attention(self, causal: bool) -> int:
        """Forward FLOPs of scores and values: two matmuls of head_dim per head and visible pair."""
        config = self.config
        windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        pairs = sum(visible_pairs(self.seq_len, window) if causal else self.seq_len**2 for window in windows)
        return int(4 * config.num_attention_heads * config.head_dim * pairs)


def visible_pairs(seq_len: int, window: int | None = None) -> float:
    """Area under the causal mask, in (query, key) pairs.

    The sum over whole positions, min(1, W) + ... + min(T, W), is half a pair more for each position up to W.
    """
    width = seq_len if window is None else min(window, seq_len)
    return width * seq_len - width**2 / 2


def num_parameters(config: GemmaConfig) -> int:
    """Parameters of the model, with the embedding that the output head shares counted once."""
    layer = sum(m * n for m, n in projections(config).values()) + 2 * config.hidden_size
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * layer + config.hidden_size


def projections(config: GemmaConfig) -> dict[str, tuple[int, int]]:
    """The layer's weights: name -> (in_features, out_features)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def report(counter: FlopCounter) -> dict[str, Any]:
    """Return all figures as plain values that JSON can hold; FLOPs are in units of one."""
    passes = {"forward": False, "training": True}
    masks = {"causal": True, "full_square": False}
    return {
        "seq_len": counter.seq_len,
        "lora_rank": counter.lora_rank,
        "lora_targets": list(counter.lora_targets) if counter.lora_rank is not None else [],
        "parameters": {
            "model": num_parameters(counter.config),
            "adapters": counter.num_adapter_parameters,
            "trainable": counter.num_trainable_parameters,
        },
        "terms": {term.name: {"forward": term.forward, "training": term.training} for term in counter.terms()},
        "per_sequence": {
            mask: {name: counter.per_sequence(training, causal) for name, training in passes.items()}
            for mask, causal in masks.items()
        },
        "per_token": {
            mask: {name: counter.per_token(training, causal) for name, training in passes.items()}
            for mask, causal in masks.items()
        },
    }


def table(counter: FlopCounter) -> str:
    """Return the figures as text for a terminal."""
    figures = report(counter)
    sequence = figures["per_sequence"]
    total = sequence["causal"]["training"]
    unit, scale = next(((name, size) for name, size in _UNITS if total >= size), _UNITS[-1])
    lines = [f"{unit + ' per sequence':<20}{'forward':>12}{'training':>12}{'share':>9}"]
    totals = {"total, causal": sequence["causal"], "total, full square": sequence["full_square"]}
    rows = [*figures["terms"].items(), *totals.items()]
    for name, flops in rows:
        forward, training = flops["forward"] / scale, flops["training"] / scale
        lines.append(f"{name:<20}{forward:>12.3f}{training:>12.3f}{flops['training'] / total:>9.1%}")
    lines.append("")
    lines.append(f"{counter.seq_len} tokens per sequence, {counter.per_token() / 1e9:,.4g} GFLOP per token in training")
    lines += [f"parameters, {name}: {count:,}" for name, count in figures["parameters"].items() if count]
    return "\n".join(lines)
