"""How one model becomes many devices: the mesh, and the table that says which axis splits which dimension.

Three mesh axes. ``data`` repeats the model and splits the batch; ``fsdp`` splits the batch *and* the parameters, which
are gathered just before use (ZeRO stage 3, arXiv:1910.02054; GSPMD, arXiv:2105.04663); ``tensor`` splits heads
and feed-forward width (arXiv:1909.08053). A spec names, for each dimension of a tensor, the axis or axes that split it.

Nothing here imports torch_xla: these are plain tuples, and `gemma_xla.xla` gives them to the compiler.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemma_xla.config import LoraSection, MeshSection
from gemma_xla.errors import UserError
from gemma_xla.model.config import GemmaConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

Spec = tuple[str | tuple[str, ...] | None, ...]


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def num_devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        """Parts that the batch is split into."""
        return self.data * self.fsdp

    def ways(self, entry: str | tuple[str, ...] | None) -> int:
        """Parts that a spec's entry splits a dimension into."""
        return math.prod(getattr(self, name) for name in _names(entry))


def resolve_mesh(section: MeshSection, num_devices: int) -> MeshShape:
    """Fill in the axis that is -1.

    Raises:
        UserError: more than one axis is -1, one is 0 or below -1, or the axes do not multiply to ``num_devices``.
    """
    sizes = {axis: getattr(section, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise UserError(f"mesh.{axis} is {size}; give a number of devices, or -1 for those that remain")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: {' and '.join(free)} are both -1; only one axis can take the devices that remain")
    known = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % known or (not free and known != num_devices):
        named = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"mesh: {named} does not fit {num_devices} device(s); make the product equal to that number")
    if free:
        sizes[free[0]] = num_devices // known
    return MeshShape(**sizes)


def check_slices(mesh: MeshShape, slices: Sequence[int]) -> None:
    """Refuse a mesh of which more than the data axis would run from slice to slice, over the slow network.

    Args:
        mesh: of all devices.
        slices: the slice that each device is in, in the order of the mesh's devices.

    Raises:
        UserError: the data axis does not divide into the slices, or the devices are not ordered by them.
    """
    count = len(set(slices))
    if mesh.data % count:
        raise UserError(
            f"mesh.data is {mesh.data}, but the devices are {count} slices, each of which holds a whole model; set "
            f"mesh.data={count} (or a multiple of it)"
        )
    size = len(slices) // count
    if any(len(set(slices[start : start + size])) > 1 for start in range(0, len(slices), size)):
        raise UserError(
            "mesh: PyTorch/XLA does not number the devices slice by slice, or the slices differ in size; use equal "
            "slices, or one"
        )


@dataclass(frozen=True)
class Rule:
    """Parameters whose name matches ``pattern`` are stored as ``stored`` says."""

    pattern: str
    stored: Spec


# PyTorch keeps a matrix as [out, in]. "kv" is the tensor axis where it divides the key/value heads; with fewer heads
# than devices (multi-query attention) each device keeps them whole.
PARAMETER_RULES = (
    Rule(r"model\.embed_tokens\.weight", (("tensor", "fsdp"), None)),
    Rule(r"model\.layers\.\d+\.self_attn\.q_proj\.weight", (("tensor", "fsdp"), None)),
    Rule(r"model\.layers\.\d+\.self_attn\.[kv]_proj\.weight", (("kv", "fsdp"), None)),
    Rule(r"model\.layers\.\d+\.self_attn\.o_proj\.weight", ("fsdp", "tensor")),
    Rule(r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.weight", (("tensor", "fsdp"), None)),
    Rule(r"model\.layers\.\d+\.mlp\.down_proj\.weight", ("fsdp", "tensor")),
    # A few kilobytes each: whole everywhere.
    Rule(r"model\.(layers\.\d+\.(input|post_attention)_layer)?norm\.weight", (None,)),
)


def adapter_rules(lora: LoraSection) -> tuple[Rule, ...]:
    """Rules for the adapters of `gemma_xla.model.lora`: split where the matrix beside them is wide.

    Along the tensor axis, B is split like the outputs of a matrix that is split by outputs, and A like the inputs of
    one that is split by inputs, so an adapter adds no communication along that axis but the sum its matrix needs too.
    """
    rules = []
    for target in lora.target_modules:
        by_outputs = target not in ("o_proj", "down_proj")
        outputs = "kv" if target in ("k_proj", "v_proj") else "tensor"
        prefix = rf"model\.layers\.\d+\.\w+\.{target}\.lora_"
        rules.append(Rule(rf"{prefix}A\.weight", (None, "fsdp" if by_outputs else ("tensor", "fsdp"))))
        rules.append(Rule(rf"{prefix}B\.weight", ((outputs, "fsdp") if by_outputs else "fsdp", None)))
        if lora.use_dora:
            rules.append(Rule(rf"{prefix}magnitude_vector", (None,)))
    return tuple(rules)


# What a module returns, by the module's name. The gradient that comes back is split in the same way.
ACTIVATION_RULES = (
    Rule(r"model\.embed_tokens", (BATCH, None, None)),
    Rule(r"model\.layers\.\d+\.self_attn\.q_proj", (BATCH, None, "tensor")),
    Rule(r"model\.layers\.\d+\.self_attn\.[kv]_proj", (BATCH, None, "kv")),
    Rule(r"model\.layers\.\d+\.mlp\.(gate|up)_proj", (BATCH, None, "tensor")),
    Rule(r"model\.layers\.\d+(\.self_attn\.o_proj|\.mlp\.down_proj)?", (BATCH, None, None)),
)

INPUT_SPEC: Spec = (BATCH, None)


def match(
    rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], mesh: MeshShape, config: GemmaConfig
) -> dict[str, Spec]:
    """Give each parameter its spec.

    Raises:
        UserError: a parameter matches no rule or several, a rule matches nothing, the ranks differ, or the mesh does
            not divide a dimension.
    """
    rules = tuple(rules)
    unused = set(rules)
    specs = {}
    for name, shape in shapes.items():
        found = [rule for rule in rules if re.fullmatch(rule.pattern, name)]
        if len(found) != 1:
            which = ", ".join(repr(rule.pattern) for rule in found) or "none"
            raise UserError(f"sharding: parameter {name!r} must match exactly one partition rule; it matches {which}")
        unused.discard(found[0])
        specs[name] = resolve_spec(found[0].stored, mesh, config)
        _check_divides(name, shape, specs[name], mesh)
    if unused:
        raise UserError(f"sharding: no parameter matches the partition rule(s) {sorted(r.pattern for r in unused)}")
    return specs


def resolve_spec(spec: Spec, mesh: MeshShape, config: GemmaConfig) -> Spec:
    """Replace the "kv" axis by the tensor axis or, where that does not divide the key/value heads, by nothing."""
    kv = () if config.num_key_value_heads % mesh.tensor else ("tensor",)

    def entry(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = tuple(name for axis in _names(axes) for name in (kv if axis == "kv" else (axis,)))
        return names[0] if len(names) == 1 else names or None

    return tuple(entry(axes) for axes in spec)


def gathered(spec: Spec) -> Spec:
    """The spec of a parameter while it is used: whole along the fsdp axis."""

    def entry(axes: str | tuple[str, ...] | None) -> str | None:
        return next((name for name in _names(axes) if name != "fsdp"), None)

    return tuple(entry(axes) for axes in spec)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of a spec's entry."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def check_heads(config: GemmaConfig, mesh: MeshShape) -> None:
    """Refuse a tensor axis that would cut a head in two."""
    if config.num_attention_heads % mesh.tensor:
        raise UserError(
            f"mesh.tensor is {mesh.tensor}, which does not divide the model's {config.num_attention_heads} attention "
            "heads; choose one of their divisors"
        )


def _check_divides(name: str, shape: tuple[int, ...], spec: Spec, mesh: MeshShape) -> None:
    if len(shape) != len(spec):
        raise UserError(f"sharding: parameter {name!r} has {len(shape)} dimensions, its partition rule {len(spec)}")
    for dim, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        ways = mesh.ways(entry)
        if size % ways:
            raise UserError(
                f"mesh: {entry} splits dimension {dim} of {name!r} ({size}) into {ways} parts, which does not divide "
                "it; choose a smaller mesh axis"
            )
