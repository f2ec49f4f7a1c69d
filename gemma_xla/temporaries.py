"""The memory that a step takes at the very least beside its arguments, and which activations the rest has room for.

What a compiler might do without is left out, so the truth lies above, often far.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gemma_xla.chips import Sourced
from gemma_xla.config import LoraSection, TrainSection
from gemma_xla.flops import projections
from gemma_xla.model.config import GemmaConfig
from gemma_xla.sharding import MeshShape

_FLOAT32 = 4
# Of a device's memory, what the least that a step takes may come to. Compilers took 0.3 to 3.2 GiB on top of that, and
# keep some for themselves.
_FILL = 0.8
# What of the config's `train` says how much is kept, most first: all there is; of each layer what costs most to compute
# again for its size; or nothing (by the TPU compiler's account: docs/LOG.md, 2026-11-28). With products in 8 bits
# computing again takes half as long, and no longer than fetching what was kept in the layout that these need.
_ATTENTION = {"remat": "full", "keep": {"attention": "all"}}
_SCANNED: list[dict[str, Any]] = [
    {"remat": "none", "keep": {}},
    {"remat": "full", "keep": {"attention": "all", "gate_proj": "all"}},
    _ATTENTION,
    {"remat": "full", "keep": {}},
]


def kept_choices(train: TrainSection) -> list[dict[str, Any]]:
    """Values of ``remat`` and ``keep`` to choose from, the fastest first, which need most memory.

    Layers that are a loop in Python keep nothing by name.
    """
    if train.layers == "loop":
        return [choice for choice in _SCANNED if not choice["keep"]]
    return _SCANNED if train.precision == "default" else _SCANNED[_SCANNED.index(_ATTENTION) :]


@dataclass(frozen=True)
class Step:
    """What decides how much memory a step takes.

    Attributes:
        train: the config's section.
        lora: the adapters', if there are any.
        model: the architecture.
        mesh: the devices of one slice.
        seq_len: positions of a row.
        positions: of a micro-batch on each device.
        itemsize: bytes of a value in the compute dtype.
        trained: bytes of the parameters that are trained, on one device, float32.
        held: bytes that a device keeps from step to step, gradients included.
        uses_splash: whether attention is the kernel that keeps no scores.
    """

    train: TrainSection
    lora: LoraSection | None
    model: GemmaConfig
    mesh: MeshShape
    seq_len: int
    positions: int
    itemsize: int
    trained: int
    held: int
    uses_splash: bool

    @property
    def kept(self) -> dict[str, int]:
        """Where layers are a compiled loop: in how many of them each named activation is kept for the backward pass."""
        return {} if self.train.layers == "loop" else self.train.kept(self.model.num_hidden_layers)


def choose_remat(step: Step, hbm_bytes: Sourced | None) -> TrainSection:
    """Return ``step.train`` with ``remat: auto`` resolved: the most that memory has room for.

    Args:
        step: with any ``remat``.
        hbm_bytes: a device's memory; None: it has none of its own, and nothing is computed twice.
    """
    if step.train.remat != "auto":
        return step.train
    choices = [step.train.model_copy(update=choice) for choice in kept_choices(step.train)]
    if hbm_bytes is None:
        return step.train.model_copy(update=_SCANNED[0])
    room = _FILL * hbm_bytes.value
    tried = (dataclasses.replace(step, train=choice) for choice in choices)
    fitting = (one.train for one in tried if one.held + temporaries(one, frugal=False) <= room)
    return next(fitting, choices[-1])


def temporaries(step: Step, *, frugal: bool = True) -> int:
    """The most of what lives at one moment: in the loss, in a layer's backward pass, or at the end of them all.

    Args:
        step: what is planned.
        frugal: whether the compiler is taken to compute again, where ``layers=loop`` lets it, all but a layer's input;
            it begins to when it has no room for activations.
    """
    section = step.train
    # Python's loop keeps whatever the backward pass would have to compute again.
    keeps = section.remat == "none" and section.layers == "loop" and not frugal
    weights, gradients = _stacked(step)
    moment = max(_loss(step), gradients + max(_attention(step, keeps), _mlp(step, keeps)))
    moment += weights + step.positions * _kept_values(step, keeps) * step.itemsize
    if step.train.optimizer.clip_norm:
        # None can be used before all are there.
        moment = max(moment, step.trained * _gradient_itemsize(step) // _FLOAT32)
    return moment


def _gradient_itemsize(step: Step) -> int:
    return _FLOAT32 if step.train.reduce_dtype == "float32" else step.itemsize


def _stacked(step: Step) -> tuple[int, int]:
    """With ``layers=scan``: the layers' weights side by side, over which the loop runs, and their gradients."""
    if step.train.layers == "loop":
        return 0, 0
    weights = step.model.num_hidden_layers * layer_parameters(step) // step.mesh.fsdp
    gradients = step.trained if step.lora else weights * _FLOAT32
    return weights * step.itemsize, gradients


def activation_widths(step: Step) -> dict[str, int]:
    """Values per position on a chip of what may be kept of a layer (`gemma_xla.model.config.ACTIVATIONS`)."""
    config, tensor = step.model, step.mesh.tensor
    heads, keys = config.num_attention_heads // tensor, config.num_key_value_heads // tensor
    queries = heads * config.head_dim
    # The kernel's log-sum-exp is float32.
    sums = heads * _FLOAT32 // step.itemsize if step.uses_splash else 0
    return {
        "q_proj": queries,
        "k_proj": keys * config.head_dim,
        "v_proj": keys * config.head_dim,
        "attention": queries + sums,
        "o_proj": config.hidden_size,
        "gate_proj": config.intermediate_size // tensor,
        "up_proj": config.intermediate_size // tensor,
    }


def _kept_values(step: Step, keeps: bool) -> int:
    """Values per position that live from the forward to the backward pass: each layer's input, and what is kept of it.

    Args:
        step: what is planned.
        keeps: whether it is all that another matmul would have to compute again: probabilities too, but what attention
            gives to `o_proj` only where the gradient of that matrix is asked for.
    """
    layers, widths = step.model.num_hidden_layers, activation_widths(step)
    if not keeps:
        return layers * step.model.hidden_size + sum(widths[name] * count for name, count in step.kept.items())
    heads = step.model.num_attention_heads // step.mesh.tensor
    scores = 0 if step.uses_splash else heads * step.seq_len
    if step.lora and "o_proj" not in step.lora.target_modules and not step.uses_splash:
        del widths["attention"]
    return layers * (step.model.hidden_size + sum(widths.values()) + scores)


def _loss(step: Step) -> int:
    """One chunk's logits, the embedding gathered in the compute dtype, and its gradient before chips add theirs up."""
    config, mesh, tokens = step.model, step.mesh, step.seq_len
    chunk, rows = step.train.loss_chunk, step.positions // tokens
    logits = rows * min(chunk, tokens) * config.vocab_size // mesh.tensor * step.itemsize
    embedding = outer_parameters(step)
    gathered = embedding * step.itemsize if mesh.fsdp > 1 else 0
    # Several chunks add to it in float32.
    gradient = embedding * (_FLOAT32 if chunk < tokens else step.itemsize)
    return logits + gathered + (0 if step.lora else gradient)


def _attention(step: Step, keeps: bool) -> int:
    """One layer's probabilities, if they are not kept anyway, and their gradient, over the whole square."""
    if step.uses_splash:
        return 0
    heads = step.model.num_attention_heads // step.mesh.tensor
    scores = step.positions * step.seq_len * heads * step.itemsize
    return scores * (1 if keeps else 2)


def _mlp(step: Step, keeps: bool) -> int:
    """One layer's gate and up, if they are not kept anyway, the gradient of their product, and a gathered matrix."""
    config, mesh = step.model, step.mesh
    width = config.intermediate_size // mesh.tensor
    gathered = config.hidden_size if mesh.fsdp > 1 else 0
    # Those of the last layer, which is first to run backwards, are not kept where only some layers' are.
    kept = 2 * keeps or sum(step.kept.get(name) == config.num_hidden_layers for name in ("gate_proj", "up_proj"))
    return width * (gathered + step.positions * (3 - kept)) * step.itemsize


def layer_parameters(step: Step) -> int:
    """Parameters of one layer's matrices on a chip while they are used: split over the tensor axis alone.

    As if keys and values were split too, even where there are fewer of their heads than chips.
    """
    return sum(m * n for m, n in projections(step.model).values()) // step.mesh.tensor


def outer_parameters(step: Step) -> int:
    return step.model.vocab_size * step.model.hidden_size // step.mesh.tensor
