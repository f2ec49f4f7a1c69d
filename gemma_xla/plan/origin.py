"""Which part of the model an instruction of a compiled program belongs to.

Attention's products are told from others by what they are, since most names are lost in compiling:

- several products in one, each of matrices of its own (one for each sequence or key/value head); or
- an operation named after a batched product, or a line of the model's attention; or,
- where nothing has a PyTorch name, one dimension of at most 256 (a head's) and two no smaller than the sequence: the
  case of one sequence and one key/value head, which compiles into a plain product. A key projection of a model that is
  as wide as the sequence is long looks the same.

The largest array of such a product is the scores. Whatever else is named after softmax, stands in the model's
attention, or makes an array of just as many elements, is attention's too (scaling, masking). What the compiler fuses
into a matrix product counts with it, on either side. A mask that is not yet repeated for each head counts as other; a
feed-forward array that happens to be as large as the scores (Gemma 2B at 2048 tokens) counts as attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gemma_xla.plan.hlo import Computation, Instruction, Module
from gemma_xla.plan.products import Product, products

_BATCHED = re.compile(r"aten__(matmul|bmm|baddbmm)\b")
_SOFTMAX = re.compile(r"aten__(softmax|_softmax)")
_FILE = "model/attention.py"
_LARGEST_HEAD = 256


def _parts(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """An instruction and every other that is fused into it."""
    yield instruction
    fused = module.fused(instruction)
    for inner in fused.instructions.values() if fused else ():
        yield from _parts(module, inner)


def _sequence(entry: Computation) -> int:
    """Length of the sequences of token ids that a program takes; 0: it takes none."""
    inputs = (i for i in entry.instructions.values() if i.opcode == "parameter")
    return max((a.dims[-1] for i in inputs for a in i.arrays if a.dtype == "s32" and a.dims), default=0)


class Origins:
    """Tells the parts of one program apart."""

    def __init__(self, module: Module) -> None:
        self.module = module
        instructions = [(i, c) for c in module.computations.values() for i in c.instructions.values()]
        self._has_names = any("aten__" in i.attributes for i, _ in instructions)
        self._tokens = _sequence(module.entry)
        plain = [(i, c) for i, c in instructions if i.opcode in ("convolution", "dot")]
        found = [p for i, c in plain for p in products(module, i, c) if self.is_attention_product(p)]
        self._scores = {max(product.sizes) for product in found}

    def is_attention_product(self, product: Product) -> bool:
        """Whether a product is one of attention's."""
        instruction = product.instruction
        if product.is_batched or _FILE in instruction.source_file or _BATCHED.search(instruction.op_name):
            return True
        head, *others = sorted(product.dims)
        return not self._has_names and head <= _LARGEST_HEAD and 0 < self._tokens <= min(others)

    def part(self, instruction: Instruction, found: list[Product]) -> str:
        """The part of the model: "matmuls", "attention" or "other".

        Args:
            instruction: of the program, a fusion perhaps.
            found: the products in it.
        """
        if found:
            return "attention" if any(map(self.is_attention_product, found)) else "matmuls"
        return "attention" if any(map(self._is_attentions, _parts(self.module, instruction))) else "other"

    def _is_attentions(self, instruction: Instruction) -> bool:
        if _SOFTMAX.search(instruction.op_name) or _FILE in instruction.source_file:
            return True
        return any(array.num_elements in self._scores for array in instruction.arrays)


def source(instruction: Instruction) -> str:
    """Where an instruction comes from, as far as the compiler tells."""
    file = instruction.source_file.rpartition("gemma_xla/")[2] if "gemma_xla/" in instruction.source_file else ""
    name = "/".join(instruction.op_name.split("/")[-2:])
    return f"{name} ({file})" if file else name
