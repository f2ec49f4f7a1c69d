"""One optimizer step: what the devices do."""

from __future__ import annotations

import torch

from gemma_xla.backend import Backend
from gemma_xla.config import TrainSection
from gemma_xla.model.gemma import Gemma
from gemma_xla.model.loss import IGNORE_INDEX
from gemma_xla.sharding import INPUT_SPEC, Spec
from gemma_xla.train.parallelize import parallelize

Batch = dict[str, torch.Tensor]
# In place of 0, as a warm-up begins with: AdamW on a device divides by the rate, and where the second moment is 0 too,
# as that of a new adapter's A, the result would not be a number.
SMALLEST_RATE = 1e-37


class TrainStep:
    """Forward, backward, clipping and update over the micro-batches of one step.

    The gradient is that of the mean loss over all tokens of the step: each micro-batch adds the gradient of its
    *summed* loss, and the sum is divided by the number of real tokens once. So micro-batches with much padding weigh
    less, and the result equals that of one large batch.
    """

    def __init__(
        self, model: Gemma, optimizer: torch.optim.Optimizer, backend: Backend, *, clip_norm: float, loss_chunk: int
    ) -> None:
        """
        Args:
            model: parallelized.
            optimizer: over the model's parameters.
            backend: where they are.
            clip_norm: the largest global gradient norm; 0: no clipping.
            loss_chunk: positions per row whose logits exist at one time.
        """
        self.model = model
        self.optimizer = optimizer
        self.backend = backend
        self.clip_norm = clip_norm
        self.loss_chunk = loss_chunk

    def __call__(self, micro_batches: list[Batch], learning_rate: float) -> torch.Tensor:
        """Take one step; return its mean loss, gradient norm before clipping, trained tokens and real tokens.

        ``[4]``, float32. Trained tokens are those that the loss counts, real tokens all that are not padding.

        The result may still be in the making on the device: reading it waits.
        """
        totals = None
        for i, batch in enumerate(micro_batches):
            if i:
                # A graph per micro-batch: one that held them all would take as long to compile as it is long.
                self.backend.flush()
            totals = self.accumulate(batch, totals)
        result = self.update(totals, learning_rate)
        self.backend.flush()
        return result

    def accumulate(self, batch: Batch, totals: torch.Tensor | None = None) -> torch.Tensor:
        """Add a micro-batch's gradients to those before; return ``totals`` with its loss, trained and real tokens.

        ``[3]``, float32, of the rows that this process computes.
        """
        loss, counts = summed_loss(self.model, batch, self.backend, self.loss_chunk)
        loss.backward()
        own = torch.stack([loss.detach(), *counts])
        return own if totals is None else totals + own

    def update(self, totals: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """Take the optimizer's step, and return what `__call__` does."""
        total_loss, trained, real = self.backend.total(totals)
        grad_norm = self._scale_gradients(trained)
        rate = self.backend.scalar(max(learning_rate, SMALLEST_RATE))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([total_loss / trained, grad_norm, trained, real])

    @torch.no_grad()
    def _scale_gradients(self, tokens: torch.Tensor) -> torch.Tensor:
        """Divide by the number of tokens and clip, in one pass; return the norm in between."""
        gradients, squares = self.backend.sum_gradients(self.model)
        norm = squares.sqrt() / tokens
        scale = 1.0 / tokens
        if self.clip_norm:
            scale = scale * torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
        return norm


def make_step(
    model: Gemma,
    specs: dict[str, Spec],
    optimizer: torch.optim.Optimizer,
    backend: Backend,
    section: TrainSection,
    dtype: torch.dtype,
) -> TrainStep:
    """The step of a run, and of its plan.

    Args:
        model: its parameters already placed; it is parallelized here.
        specs: how each parameter is stored.
        optimizer: over the model's parameters.
        backend: where they are.
        section: the config's ``train``.
        dtype: the compute dtype.
    """
    parallelize(model, specs, backend, section, dtype)
    options = {"clip_norm": section.optimizer.clip_norm, "loss_chunk": section.loss_chunk}
    return TrainStep(model, optimizer, backend, **options)


def summed_loss(model: Gemma, batch: Batch, backend: Backend, loss_chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of the rows that this process computes, on XLA all, and `counts`, all float32."""
    batch = backend.place_batch(batch, INPUT_SPEC)
    return model(**batch, loss_chunk=loss_chunk, loss_layout=backend.loss_layout), counts(batch)


def counts(batch: Batch) -> torch.Tensor:
    """The numbers of trained and of real tokens, ``[2]``, float32."""
    return torch.stack([(batch["shift_labels"] != IGNORE_INDEX).sum(), (batch["segment_ids"] != 0).sum()]).float()
