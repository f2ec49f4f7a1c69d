"""One optimizer step: what the devices do."""

from __future__ import annotations

import torch

from gemma_xla.backend import Backend
from gemma_xla.model.gemma import Gemma
from gemma_xla.model.loss import IGNORE_INDEX
from gemma_xla.sharding import INPUT_SPEC

Batch = dict[str, torch.Tensor]


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
        """Take one step; return (mean loss, gradient norm before clipping, real tokens), ``[3]``, float32.

        The result may still be in the making on the device: reading it waits.
        """
        total_loss = total_tokens = 0.0
        for i, batch in enumerate(micro_batches):
            if i:
                # A graph per micro-batch: one that held them all would take as long to compile as it is long.
                self.backend.flush()
            loss, tokens = summed_loss(self.model, batch, self.backend, self.loss_chunk)
            loss.backward()
            total_loss, total_tokens = total_loss + loss.detach(), total_tokens + tokens
        grad_norm = self._scale_gradients(total_tokens)
        rate = self.backend.scalar(learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        result = torch.stack([total_loss / total_tokens, grad_norm, total_tokens])
        self.backend.flush()
        return result

    @torch.no_grad()
    def _scale_gradients(self, tokens: torch.Tensor) -> torch.Tensor:
        """Divide by the number of tokens and clip, in one pass; return the norm in between."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # Not torch's own norm: on the CPU that loses four digits over a million entries (float32, one sum).
        norm = torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum().sqrt() / tokens
        scale = 1.0 / tokens
        if self.clip_norm:
            scale = scale * torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
        return norm


def summed_loss(model: Gemma, batch: Batch, backend: Backend, loss_chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of this host's rows and everyone else's, and the number of real tokens, both float32."""
    batch = backend.place_batch(batch, INPUT_SPEC)
    loss = model(**batch, loss_chunk=loss_chunk)
    return loss, (batch["shift_labels"] != IGNORE_INDEX).sum().float()
