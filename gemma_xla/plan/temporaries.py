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
    # Python's loop keeps whatever the backward pass would have to compute again.
    keeps = section.remat == "none" and section.layers == "loop" and not frugal
    weights, gradients = _stacked(setup)
    moment = max(_loss(setup), gradients + max(_attention(setup, keeps), _mlp(setup, keeps)))
    moment += weights + positions(setup) * _kept_values(setup, keeps) * itemsize(setup)
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


def activation_widths(setup: Setup) -> dict[str, int]:
    """Values per position on a chip of what may be kept of a layer (`gemma_xla.model.config.ACTIVATIONS`)."""
    config, tensor = setup.model, setup.hardware.slice_mesh.tensor
    heads, keys = config.num_attention_heads // tensor, config.num_key_value_heads // tensor
    queries = heads * config.head_dim
    # The kernel's log-sum-exp is float32.
    sums = heads * _FLOAT32 // itemsize(setup) if setup.uses_splash else 0
    return {
        "q_proj": queries,
        "k_proj": keys * config.head_dim,
        "v_proj": keys * config.head_dim,
        "attention": queries + sums,
        "o_proj": config.hidden_size,
        "gate_proj": config.intermediate_size // tensor,
        "up_proj": config.intermediate_size // tensor,
    }


def _kept_values(setup: Setup, keeps: bool) -> int:
    """Values per position that live from the forward to the backward pass: each layer's input, and what is kept of it.

    Args:
        setup: what is planned.
        keeps: whether it is all that another matmul would have to compute again: probabilities too, but what attention
            gives to `o_proj` only where the gradient of that matrix is asked for.
    """
    layers, widths = setup.model.num_hidden_layers, activation_widths(setup)
    if not keeps:
        return layers * setup.model.hidden_size + sum(widths[name] * count for name, count in setup.kept.items())
    heads = setup.model.num_attention_heads // setup.hardware.slice_mesh.tensor
    scores = 0 if setup.uses_splash else heads * setup.flops.seq_len
    if setup.config.lora and "o_proj" not in setup.config.lora.target_modules and not setup.uses_splash:
        del widths["attention"]
    return layers * (setup.model.hidden_size + sum(widths.values()) + scores)


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
    if setup.uses_splash:
        return 0
    heads = setup.model.num_attention_heads // setup.hardware.slice_mesh.tensor
    scores = positions(setup) * setup.flops.seq_len * heads * itemsize(setup)
    return scores * (1 if keeps else 2)


def _mlp(setup: Setup, keeps: bool) -> int:
    """One layer's gate and up, if they are not kept anyway, the gradient of their product, and a gathered matrix."""
    config, mesh = setup.model, setup.hardware.slice_mesh
    width = config.intermediate_size // mesh.tensor
    gathered = config.hidden_size if mesh.fsdp > 1 else 0
    # Those of the last layer, which is first to run backwards, are not kept where only some layers' are.
    kept = 2 * keeps or sum(setup.kept.get(name) == config.num_hidden_layers for name in ("gate_proj", "up_proj"))
    return width * (gathered + positions(setup) * (3 - kept)) * itemsize(setup)


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
