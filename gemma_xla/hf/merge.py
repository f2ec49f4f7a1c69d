"""A base model and its adapter, read as one model."""

from __future__ import annotations

import torch

from gemma_xla.config import LoraSection
from gemma_xla.errors import UserError
from gemma_xla.hf.reader import TensorReader
from gemma_xla.model.lora import row_lengths, scaling
from gemma_xla.tensor_file import CHUNK, Index, bounded

_ADVICE = "give the base model that it was trained on"


class MergedReader(TensorReader):
    """Reads ``W + scaling * B A`` (arXiv:2106.09685) in place of each adapted weight, computed in float32.

    With DoRA (arXiv:2402.09353) each row of that is brought to the length that its magnitude says. All other tensors
    are the base's.
    """

    def __init__(self, base: TensorReader, adapter: TensorReader, lora: LoraSection) -> None:
        """
        Args:
            base: a Gemma's tensors, as `gemma_xla.hf.check_tensors` wants them.

        Raises:
            UserError: the adapter is for another model.
        """
        self._base, self._adapter, self._lora = base, adapter, lora
        self._modules = {f"{module}.weight": module for module in adapted_modules(adapter, lora)}
        self._check_names()
        for weight, module in self._modules.items():
            self._check_shapes(weight, module)

    def names(self) -> list[str]:
        return self._base.names()

    def where(self, name: str) -> str:
        return self._base.where(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._modules else self._base.dtype(name)

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        shape = [at.stop - at.start for at in bounded(index, self.shape(name))]
        out = torch.empty(shape, dtype=self.dtype(name))
        self.copy_to(name, out, index)
        return out

    def copy_to(self, name: str, out: torch.Tensor, index: Index | None = None) -> None:
        if name not in self._modules:
            self._base.copy_to(name, out, index)
            return
        out = out.detach()
        rows, columns = bounded(index, self.shape(name))
        total, width = self.shape(name)
        # Always the same blocks, whatever part is asked for: so its bits are those of the whole.
        step = max(1, CHUNK // (4 * width))
        a, b, *magnitude = (self._adapter.read(part).float() for part in self._parts(name))
        for start in range(rows.start // step * step, rows.stop, step):
            block = slice(start, min(start + step, total))
            weight = self._base.read(name, (block,)).float() + scaling(self._lora) * (b[block] @ a)
            if magnitude:
                weight *= (magnitude[0][block] / row_lengths(weight))[:, None]
            low, high = max(start, rows.start), min(block.stop, rows.stop)
            out[low - rows.start : high - rows.start].copy_(weight[low - start : high - start, columns])

    def _parts(self, weight: str) -> list[str]:
        return [f"{self._modules[weight]}.{part}" for part in _parts(self._lora)]

    def _check_names(self) -> None:
        weights = {name: name.removesuffix(".weight").rpartition(".")[2] for name in self._base.names()}
        expected = {name for name, leaf in weights.items() if leaf in self._lora.target_modules}
        if different := expected ^ self._modules.keys():
            name = min(different)
            lacking, having = ("it", "that") if name in expected else ("that", "it")
            any_part, any_weight = self._adapter.names()[0], self._base.names()[0]
            raise UserError(
                f"{self._adapter.where(any_part)}: the adapter is for another base model than "
                f"{self._base.where(any_weight)}: {lacking} has nothing for {name}, {having} has; {_ADVICE}"
            )

    def _check_shapes(self, weight: str, module: str) -> None:
        rows, columns = self._base.shape(weight)
        expected = [(self._lora.rank, columns), (rows, self._lora.rank), (rows,)]
        for name, shape in zip(self._parts(weight), expected, strict=False):
            if (found := self._adapter.shape(name)) != shape:
                raise UserError(
                    f"{self._adapter.where(name)}: the adapter is for another base model: {name} has shape "
                    f"{list(found)}, but in {self._base.where(weight)} {weight} has {[rows, columns]}; {_ADVICE}"
                )


def adapted_modules(adapter: TensorReader, lora: LoraSection) -> list[str]:
    """The modules that an adapter has tensors for, such as ``model.layers.0.self_attn.q_proj``.

    Raises:
        UserError: a tensor is missing or left over, of another type, or not of the rank that ``lora`` says.
    """
    modules: dict[str, set[str]] = {}
    for name in adapter.names():
        module, _, part = name.partition(".lora_")
        if f"lora_{part}" not in _parts(lora) or module.rpartition(".")[2] not in lora.target_modules:
            raise UserError(
                f"{adapter.where(name)}: {name} does not belong to an adapter of {', '.join(lora.target_modules)}; "
                "merge it with peft (merge_and_unload, save_pretrained) and use the model that this makes"
            )
        if not adapter.dtype(name).is_floating_point:
            raise UserError(f"{adapter.where(name)}: {name} is stored as {adapter.dtype(name)}; save it as float32")
        modules.setdefault(module, set()).add(f"lora_{part}")
    for module, found in modules.items():
        if missing := set(_parts(lora)) - found:
            where = adapter.where(f"{module}.{min(found)}")
            raise UserError(f"{where}: {module}.{min(missing)} is missing; write or download the adapter again")
        shape = adapter.shape(f"{module}.lora_A.weight")
        if shape[:1] != (lora.rank,):
            where = adapter.where(f"{module}.lora_A.weight")
            raise UserError(
                f"{where}: {module}.lora_A.weight has shape {list(shape)}, but its config says that its rank is "
                f"{lora.rank}; take both files from the same adapter"
            )
    if not modules:
        raise UserError("the adapter holds no tensors; write or download it again")
    return list(modules)


def _parts(lora: LoraSection) -> list[str]:
    """What the tensors of a module are called."""
    return ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if lora.use_dora else [])]
