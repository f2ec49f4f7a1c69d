"""The memory that a step takes at the very least beside its arguments.

What a compiler might do without is left out, so the truth lies above, often far.
"""

from __future__ import annotations

from gemma_xla.flops import projections
from gemma_xla.plan.setup import Setup

_FLOAT32 = 4


def temporaries(setup: Setup, *, frugal: bool = True) -> int:
    """The most of what lives at one moment: in the loss, in a layer's backward pass, or at the end of them all.

    Args:
        setup: what is planned.
        frugal: whether the compiler is taken to compute again, where ``layers=loop`` lets it, all but a layer's input;
            it begins to when it has no room for activations.
    """
    section = setup.config.train
    keeps = section.remat == "none" and not (frugal and section.layers == "loop")
    weights, gradients = _stacked(setup)
    moment = max(_loss(setup), gradients + max(_attention(setup, keeps), _mlp(setup, keeps)))
    width = _kept_width(setup) if keeps else setup.model.hidden_size
    moment += weights + positions(setup) * width * setup.model.num_hidden_layers * itemsize(setup)
    if setup.config.train.optimizer.clip_norm:
        # None can be used before all are there.
        moment = max(moment, setup.memory.trained * itemsize(setup) // _FLOAT32)
    return moment


def _stacked(setup: Setup) -> tuple[int, int]:
    """With ``layers=scan``: the layers' weights side by side, over which the loop runs, and their gradients."""
    if setup.config.train.layers == "loop":
        return 0, 0
    weights = setup.model.num_hidden_layers * layer_parameters(setup) // setup.hardware.slice_mesh.fsdp
    gradients = setup.memory.trained if setup.config.lora else weights * _FLOAT32
    return weights * itemsize(setup), gradients


def _kept_width(setup: Setup) -> int:
    """Values per position and layer that live from the forward to the backward pass without rematerialisation.

    Those that another matmul would have to compute again: the residual stream before attention and before the
    feed-forward part, queries, keys, values, probabilities, gate and up, and what attention gives to `o_proj` where the
    gradient of that matrix is asked for.
    """
    config, tensor, lora = setup.model, setup.hardware.slice_mesh.tensor, setup.config.lora
    heads, keys = config.num_attention_heads // tensor, config.num_key_value_heads // tensor
    width = 2 * config.hidden_size + heads * setup.flops.seq_len + 2 * config.intermediate_size // tensor
    given = lora is None or "o_proj" in lora.target_modules
    return width + (heads * (2 if given else 1) + 2 * keys) * config.head_dim


def _loss(setup: Setup) -> int:
    """One chunk's logits, the embedding gathered in the compute dtype, and its gradient before chips add theirs up."""
    config, mesh, tokens = setup.model, setup.hardware.slice_mesh, setup.flops.seq_len
    chunk, rows = setup.config.train.loss_chunk, positions(setup) // tokens
    logits = rows * min(chunk, tokens) * config.vocab_size // mesh.tensor * itemsize(setup)
    embedding = outer_parameters(setup)
    gathered = embedding * itemsize(setup) if mesh.fsdp > 1 else 0
    # Several chunks add to it in float32.
    gradient = embedding * (_FLOAT32 if chunk < tokens else itemsize(setup))
    return logits + gathered + (0 if setup.config.lora else gradient)


def _attention(setup: Setup, keeps: bool) -> int:
    """One layer's probabilities, if they are not kept anyway, and their gradient, over the whole square."""
    heads = setup.model.num_attention_heads // setup.hardware.slice_mesh.tensor
    scores = positions(setup) * setup.flops.seq_len * heads * itemsize(setup)
    return scores * (1 if keeps else 2)


def _mlp(setup: Setup, keeps: bool) -> int:
    """One layer's gate and up, if they are not kept anyway, the gradient of their product, and a gathered matrix."""
    config, mesh = setup.model, setup.hardware.slice_mesh
    width = config.intermediate_size // mesh.tensor
    gathered = config.hidden_size if mesh.fsdp > 1 else 0
    return width * (gathered + positions(setup) * (1 if keeps else 3)) * itemsize(setup)


def positions(setup: Setup) -> int:
    """Positions of a micro-batch on each chip."""
    return setup.micro_batch_rows // setup.hardware.slice_mesh.batch_shards * setup.flops.seq_len


def layer_parameters(setup: Setup) -> int:
    """Parameters of one layer's matrices on a chip while they are used: split over the tensor axis alone.

    As if keys and values were split too, even where there are fewer of their heads than chips.
    """
    return sum(m * n for m, n in projections(setup.model).values()) // setup.hardware.slice_mesh.tensor


def outer_parameters(setup: Setup) -> int:
    return setup.model.vocab_size * setup.model.hidden_size // setup.hardware.slice_mesh.tensor


def itemsize(setup: Setup) -> int:
    return setup.compute_dtype.itemsize
