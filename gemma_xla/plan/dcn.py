"""Traffic between slices, which the compiler of one slice does not see."""

from __future__ import annotations

from gemma_xla.flops import projections
from gemma_xla.plan.result import Collective
from gemma_xla.plan.setup import Setup

_FLOAT32 = 4


def dcn_collective(setup: Setup) -> Collective | None:
    """Return the all-reduce of gradients between slices; None where there is but one.

    Each chip reduces the part of the gradients that it holds with the chips in its place in the other slices, once for
    each micro-batch, since each is a graph of its own. A ring takes 2 (n - 1) / n times the part's bytes. Nothing in
    the step that is compiled lets it overlap.
    """
    n, accum = setup.hardware.count, setup.config.train.grad_accum
    if n == 1:
        return None
    num_bytes = accum * gradient_bytes(setup)
    seconds = 2 * (n - 1) / n * num_bytes / setup.hardware.chip.dcn_bandwidth.value
    return Collective("all-reduce", "dcn", accum, num_bytes, seconds, overlaps=False)


def gradient_bytes(setup: Setup) -> int:
    """Bytes of gradients that a chip reduces with those that hold the same part of the model, for one micro-batch.

    Gradients are kept in float32, but a matrix is cast to the compute dtype before it is used, so that its gradient is
    reduced in that dtype and cast after, unless ``reduce_dtype`` asks for float32. Those of vectors are float32. The
    embedding has two, of the lookup and of the output layer, and each is reduced by itself.
    """
    model, mesh, lora = setup.model, setup.hardware.slice_mesh, setup.config.lora
    layers, embedding, vectors = model.num_hidden_layers, 0, 0
    if lora is None:
        embedding = model.vocab_size * model.hidden_size // (mesh.tensor * mesh.fsdp)
        vectors = (2 * layers + 1) * model.hidden_size
    elif lora.use_dora:
        vectors = layers * sum(projections(model)[target][1] for target in lora.target_modules)
    matrices = setup.memory.trained // _FLOAT32 - vectors - embedding
    itemsize = setup.compute_dtype.itemsize
    summed = _FLOAT32 if setup.config.train.reduce_dtype == "float32" else itemsize
    return matrices * summed + 2 * embedding * itemsize + vectors * _FLOAT32
