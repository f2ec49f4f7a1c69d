"""The matrix products of a compiled program: their size, and whether they are attention's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gemma_xla.plan.hlo import Computation, Instruction, Module

_INT8 = ("s8", "u8")


@dataclass(frozen=True)
class Product:
    """A convolution or dot.

    Attributes:
        instruction: it.
        flops: two for each multiplication that is not with padding.
        sizes: elements of the left matrix, the right one and the result.
        is_int8: whether both matrices are.
    """

    instruction: Instruction
    flops: int
    sizes: tuple[int, int, int]
    is_int8: bool

    @property
    def dims(self) -> tuple[float, float, float]:
        """Rows of the left matrix, columns of the right one, and what they share; of each, in a batch."""
        left, right, result = self.sizes
        products = self.flops / 2
        return products / right, products / left, products / result

    @property
    def is_batched(self) -> bool:
        """Whether these are several products, each of matrices of its own."""
        return math.prod(self.sizes) > (self.flops / 2) ** 2


def products(module: Module, instruction: Instruction, computation: Computation) -> list[Product]:
    """All products that an instruction of ``computation`` computes, with whatever is fused into it."""
    if instruction.opcode in ("convolution", "dot"):
        return [_product(instruction, computation)]
    fused = module.fused(instruction)
    if fused is None:
        return []
    return [product for inner in fused.instructions.values() for product in products(module, inner, fused)]


def _product(instruction: Instruction, computation: Computation) -> Product:
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands)
    result = instruction.arrays[0]
    count = _convolution_flops if instruction.opcode == "convolution" else _dot_flops
    sizes = (math.prod(left.dims), math.prod(right.dims), math.prod(result.dims))
    flops = count(instruction, left.dims, right.dims, result.dims)
    return Product(instruction, flops, sizes, left.dtype in _INT8 and right.dtype in _INT8)


def _dot_flops(dot: Instruction, left: tuple[int, ...], _: tuple[int, ...], result: tuple[int, ...]) -> int:
    shared = dot.find(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    return 2 * math.prod(result) * math.prod(left[int(i)] for i in shared.split(",") if i)


def _convolution_flops(
    convolution: Instruction, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]
) -> int:
    """FLOP of a convolution: the TPU compiler makes one of each product.

    Its batch and feature dimensions are a product's. A dimension over which the window moves can be anything: a batch
    (a dilated window meets one element for each position), an outer product (a padded one), or one more dimension that
    is summed over.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"{convolution.name} is a convolution without dim_labels")
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    size = {label: result[i] for i, label in enumerate(labels[3])}
    flops = 2 * size["b"] * size["f"] * right[labels[2].index("i")]
    for i, label in enumerate(sorted(size.keys() - {"b", "f"}, key=int)):
        option = {name: value.split("x")[i] for name, value in settings.items()}
        flops *= _pairs(left[labels[1].index(label)], size[label], option)
    return flops


def _pairs(length: int, positions: int, option: dict[str, str]) -> int:
    """Pairs of a window's element and one of the input's under it, over all positions of the window."""
    stride, spread = int(option.get("stride", 1)), int(option.get("lhs_dilate", 1))
    low = int(option.get("pad", "0_0").split("_")[0])
    # The first position of each remainder at which the input has an element, then every `period`th.
    period = spread // math.gcd(stride, spread)
    pairs = 0
    for element in range(int(option.get("size", 1))):
        offset = element * int(option.get("rhs_dilate", 1)) - low
        first = next((p for p in range(period) if (p * stride + offset) % spread == 0), None)
        if first is None:
            continue
        # Inside the input: 0 <= position * stride + offset <= (length - 1) * spread.
        lowest = max(0, -(offset // stride))
        highest = min(positions - 1, ((length - 1) * spread - offset) // stride)
        start = lowest + (first - lowest) % period
        pairs += max(0, (highest - start) // period + 1)
    return pairs
