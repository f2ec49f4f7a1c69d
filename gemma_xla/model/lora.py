"""Low-rank adapters (LoRA, arXiv:2106.09685) beside a Gemma's frozen weights.

Parameters are called as peft calls them in its files: ``...q_proj.lora_A.weight`` ``[rank, in]``,
``...q_proj.lora_B.weight`` ``[out, rank]`` and, with DoRA, ``...q_proj.lora_magnitude_vector`` ``[out]``. The frozen
weight keeps its name.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from gemma_xla.config import LoraSection
from gemma_xla.errors import UserError, nearest
from gemma_xla.flops import projections
from gemma_xla.model.config import LORA_TARGETS, GemmaConfig
from gemma_xla.model.gemma import Gemma, seed_of
from gemma_xla.model.kept import kept


class LoraLinear(nn.Linear):
    """``x W^T + scaling * dropout(x) A^T B^T``, of which only A and B are trained.

    With DoRA (arXiv:2402.09353) each row of ``W + scaling * B A`` is scaled to a length that is trained too; its
    present length counts as a constant (section 4.3 there).
    """

    # How the frozen weight is multiplied: another precision takes its place.
    product = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int, lora: LoraSection) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.lora_A = nn.Linear(in_features, lora.rank, bias=False)
        self.lora_B = nn.Linear(lora.rank, out_features, bias=False)
        if lora.use_dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features))
        self.use_dora, self.dropout, self.scaling = lora.use_dora, lora.dropout, scaling(lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = self.product(x, self.weight)
        dropping = self.training and self.dropout > 0
        dropped = kept().dropout(x, self.dropout) if dropping else x
        # Scaled where it is narrow.
        added = self.lora_B(self.lora_A(dropped) * self.scaling)
        if not self.use_dora:
            return plain + added
        ratio = (self.lora_magnitude_vector / self._lengths()).to(x.dtype)
        # What dropout leaves out of the adapter's input changes no row's length.
        base = self.product(dropped, self.weight) if dropping else plain
        return plain + (ratio - 1) * base + ratio * added

    @torch.no_grad()
    def _lengths(self) -> torch.Tensor:
        """The length of each row of the adapted weight, ``[out]``, float32."""
        low_rank = self.lora_B.weight.float() @ self.lora_A.weight.float()
        return row_lengths(self.weight.float() + self.scaling * low_rank)


def row_lengths(weight: torch.Tensor) -> torch.Tensor:
    """The Euclidean length of each row, ``[out]``: what a DoRA magnitude starts from."""
    return weight.pow(2).sum(dim=1).sqrt()


def scaling(lora: LoraSection) -> float:
    """What the product of the low-rank matrices is multiplied by."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)


def add_adapters(model: Gemma, lora: LoraSection) -> None:
    """Freeze a model's weights and put an adapter, of values yet to be given, beside each targeted one."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        path, _, leaf = name.rpartition(".")
        if leaf in lora.target_modules:
            adapted = LoraLinear(module.in_features, module.out_features, lora)
            adapted.weight = module.weight
            setattr(model.get_submodule(path), leaf, adapted)


@torch.no_grad()
def init_adapter(name: str, parameter: torch.Tensor, seed: int) -> None:
    """Fill ``lora_A`` with values as peft draws them and ``lora_B`` with zeros: the adapter begins as nothing.

    The values depend on ``seed`` and ``name`` alone.
    """
    if name.endswith("lora_B.weight"):
        parameter.zero_()
        return
    # Kaiming's uniform distribution with a = sqrt(5).
    bound = 1 / math.sqrt(parameter.shape[1])
    parameter.uniform_(-bound, bound, generator=torch.Generator(parameter.device).manual_seed(seed_of(seed, name)))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def check_lora(lora: LoraSection, config: GemmaConfig) -> None:
    """
    Raises:
        UserError: there is no such module, or the rank is higher than that of a matrix.
    """
    shapes = projections(config)
    for target in lora.target_modules:
        if target not in shapes:
            raise UserError(
                f"lora.target_modules: no module is called {target!r}{nearest(target, LORA_TARGETS)}; there are "
                f"{', '.join(LORA_TARGETS)}"
            )
    smallest = min(lora.target_modules, key=lambda target: min(shapes[target]))
    if lora.rank > min(shapes[smallest]):
        rows, columns = shapes[smallest][::-1]
        raise UserError(
            f"lora.rank is {lora.rank}, but {smallest} is a matrix of {rows} x {columns}; choose at most "
            f"{min(shapes[smallest])}, or leave the module out of lora.target_modules"
        )
