"""From one plain module to a run: weights cast and gathered as they are used, layers rematerialised or scanned.

The model's own code stays as it is. Each decoder layer, and the model around the layers, is a *unit*: while a unit
runs, its parameters are replaced by copies in the compute dtype, whole along the fsdp axis; gradients flow back to the
stored parameters, split like them, which makes the compiler scatter them as it reduces.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gemma_xla.backend import Backend
from gemma_xla.config import TrainSection
from gemma_xla.model.gemma import Gemma
from gemma_xla.model.kept import kept
from gemma_xla.model.layers import GemmaAttention, GemmaMLP, RMSNorm
from gemma_xla.model.linear import Products, linear
from gemma_xla.model.lora import LoraLinear, is_adapter
from gemma_xla.sharding import ACTIVATION_RULES, Spec, gathered, resolve_spec


def parallelize(
    model: Gemma, specs: dict[str, Spec], backend: Backend, section: TrainSection, dtype: torch.dtype
) -> None:
    """Change how ``model`` runs, not what it computes.

    Args:
        model: its parameters already placed.
        specs: how each parameter is stored.
        backend: where it runs.
        section: the config's ``train``: ``precision``, ``compile``, ``remat``, ``layers``.
        dtype: the compute dtype of matrices; norms keep the dtype they are stored in.
    """
    if backend.name == "torch":
        backend.use_compiler(None if section.compile == "auto" else section.compile)
    _constrain_activations(model, backend)
    _suit_compiler(model, backend, section)
    # Between processes FSDP2 does it.
    in_float32 = backend.name == "xla" and section.reduce_dtype == "float32" and dtype != torch.float32
    sums = torch.float32 if in_float32 else None
    # While layers are scanned, the first one stands for all: their specs are equal.
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}."
        own = {name.removeprefix(prefix): spec for name, spec in specs.items() if name.startswith(prefix)}
        own = _use_products(layer, own, backend, section, sums)
        if backend.compiles:
            _use_compiler(layer, backend)
        _use_as_unit(layer, own, backend, dtype)
        if section.remat == "full" and section.layers == "loop":
            _use_remat(layer, backend)
    if section.remat == "full":
        _give_gradient(model)
    outer = {name: spec for name, spec in specs.items() if ".layers." not in name}
    _use_as_unit(model, outer, backend, dtype)
    if section.layers == "scan":
        _use_scan(model, backend, section)
    reduced = dtype if section.reduce_dtype == "compute" else torch.float32
    backend.gather_units([*model.model.layers, model], dtype, reduced)


def _use_as_unit(module: nn.Module, specs: dict[str, Spec], backend: Backend, dtype: torch.dtype) -> None:
    def prepared(name: str, parameter: torch.Tensor) -> torch.Tensor:
        # Cast before gathering: half the bytes travel.
        weight = parameter.to(dtype) if parameter.dim() > 1 else parameter
        spec = specs[name]
        return weight if gathered(spec) == spec else backend.constrain(weight, gathered(spec), spec)

    plain = module.forward

    def forward(*args, **kwargs):
        with _substituted(module, specs, prepared):
            return plain(*args, **kwargs)

    module.forward = forward


def _use_products(
    layer: nn.Module, specs: dict[str, Spec], backend: Backend, section: TrainSection, sum_dtype: torch.dtype | None
) -> dict[str, Spec]:
    """Compute a layer's matrix products in 8 bits, or add their gradients up in ``sum_dtype``, if that is asked for.

    Returns the specs of the parameters that have no part in these.
    """

    def gather(spec: Spec, x: torch.Tensor) -> torch.Tensor:
        stored, whole = (
            tuple(axes if size > 1 else None for axes, size in zip(axes_of, x.shape, strict=True))
            for axes_of in (spec, gathered(spec))
        )
        # Split first, lest the compiler gather what it is made of.
        x = backend.constrain(x, stored, stored)
        rows = backend.laid_out(x, stored) if x.dtype == torch.int8 else None
        return backend.constrain(x if rows is None else rows, whole, stored)

    def gather_turned(spec: Spec, x: torch.Tensor) -> torch.Tensor:
        turned = backend.laid_out(x, spec, turned=True)
        # Sent anew, since it can lie in memory in one way only.
        return gather(spec, x).T if turned is None else gather(spec[::-1], turned)

    rest = dict(specs)
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        # Adapters' products are narrow.
        in_8_bits = section.precision == "int8" and not is_adapter(f"{name}.weight")
        if not in_8_bits and (sum_dtype is None or not module.weight.requires_grad):
            continue
        spec = rest.pop(f"{name}.weight")
        how = Products(
            frozenset(section.int8_products if in_8_bits else ()),
            section.int8_rounding == "stochastic",
            backend.int8_dot,
            gather=functools.partial(gather, spec),
            gather_turned=functools.partial(gather_turned, spec),
            scatter=lambda x, spec=spec: backend.constrain(x, spec, spec),
            layout=backend.loss_layout,
            sum_dtype=sum_dtype,
        )
        if isinstance(module, LoraLinear):
            module.product = lambda x, weight, how=how: linear(x, weight, how)
        else:
            module.forward = lambda x, module=module, how=how: linear(x, module.weight, how)
    return rest


def _use_compiler(layer: nn.Module, backend: Backend) -> None:
    """Compile a layer, once for all that are equal; what it needs of the mask is made before."""
    plain, attention = layer.forward, layer.self_attn
    compiled = backend.compile(plain)

    def forward(h, cos, sin, mask, cache=None):
        if cache is not None:
            return plain(h, cos, sin, mask, cache)
        mask.prepare(attention.impl, h.shape[1], attention.window, h.device)
        return compiled(h, cos, sin, mask)

    layer.forward = forward


@contextmanager
def _substituted(
    module: nn.Module, names: dict[str, Spec], prepared: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Put ``prepared(name, parameter)`` in the place of each named parameter for a while."""
    replaced = []
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            stored = owner._parameters[leaf]
            replaced.append((owner, leaf, stored))
            owner._parameters[leaf] = prepared(name, stored)
        yield
    finally:
        for owner, leaf, stored in replaced:
            owner._parameters[leaf] = stored


def _use_remat(layer: nn.Module, backend: Backend) -> None:
    plain = layer.forward

    def forward(h, cos, sin, mask, cache=None):
        if cache is not None or not torch.is_grad_enabled():
            return plain(h, cos, sin, mask, cache)
        return backend.remat(plain, h, cos, sin, mask, draws=draws)

    draws = _drops(layer)
    layer.forward = forward


def _drops(module: nn.Module) -> bool:
    return any(isinstance(part, LoraLinear) and part.dropout > 0 for part in module.modules())


def _give_gradient(model: Gemma) -> None:
    """Ask for the gradient of the embeddings even where they are frozen: PyTorch/XLA rematerialises nothing else."""
    if not model.model.embed_tokens.weight.requires_grad:
        model.model.embed_tokens.register_forward_hook(
            lambda _m, _args, out: out.requires_grad_(torch.is_grad_enabled())
        )


def _use_scan(model: Gemma, backend: Backend, section: TrainSection) -> None:
    decoder = model.model
    counts = section.kept(len(decoder.layers))
    draws = _drops(decoder) or (section.precision == "int8" and section.int8_rounding == "stochastic")
    for name, module in decoder.layers[0].named_modules():
        if (leaf := name.rpartition(".")[2]) in counts:
            module.register_forward_hook(lambda _m, _args, out, name=leaf: kept().replace(name, out))
    attention = decoder.layers[0].self_attn
    if "attention" in counts and attention.impl != "splash":
        # The kernel keeps more than what it returns, and does so by itself.
        attention.o_proj.register_forward_pre_hook(lambda _m, args: kept().replace("attention", *args))

    def run_layers(h, cos, sin, mask, cache):
        return backend.scan_layers(decoder.layers, h, cos, sin, mask.segment_ids_BS, counts, draws)

    rope = decoder.rope
    decoder.rope = lambda position_ids_BT: backend.by_positions(rope, position_ids_BT)
    decoder.run_layers = run_layers


def _constrain_activations(model: Gemma, backend: Backend) -> None:
    """Fix how activations are split, lest the compiler carry them from device to device to suit one operation."""
    if backend.mesh.num_devices == 1:
        return
    for name, module in model.named_modules():
        for rule in ACTIVATION_RULES:
            if re.fullmatch(rule.pattern, name):
                spec = resolve_spec(rule.stored, backend.mesh, model.config)
                module.register_forward_hook(lambda _m, _args, out, spec=spec: backend.constrain(out, spec, spec))


def _suit_compiler(model: Gemma, backend: Backend, section: TrainSection) -> None:
    """Say what a compiler does not find by itself; nothing of the results changes."""
    rope = model.model.rope
    model.model.rope = lambda position_ids_BT: backend.made_once(rope(position_ids_BT))
    # Where `up` is computed again, its product hides what the gated unit's gradient needs. Products in 8 bits hide
    # nothing: what goes into them is rounded in a pass of its own, whatever it is of.
    hides = section.remat == "full" and section.precision == "default"
    for module in model.modules():
        if isinstance(module, GemmaMLP) and hides:
            module.gated = functools.partial(backend.gated_gelu, outputs=module.down_proj.out_features)
        if isinstance(module, GemmaAttention):
            backend.suit_attention(module)
        if isinstance(module, RMSNorm):
            # Keeps its backward pass out of the matrix product before it, which a TPU does slower with it inside.
            module.register_forward_hook(lambda _m, _args, out: backend.fence_gradient(out))
