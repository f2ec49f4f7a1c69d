"""Tiny Gemmas from `transformers`, the independent reference that the model's tests compare with."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
import transformers

from gemma_xla.model.config import GemmaConfig
from gemma_xla.model.gemma import Gemma

IMPLS = ("reference", "sdpa")

# Constants differ from the defaults so that one left out shows; heads * head_dim is never hidden_size.
_BASE = GemmaConfig(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,
    rope_theta=500.0,
)
SHAPES = {
    f"{kind}-{head_dim}": dataclasses.replace(_BASE, num_key_value_heads=kv_heads, head_dim=head_dim)
    for kind, kv_heads in (("mqa", 1), ("gqa", 2), ("mha", 4))
    for head_dim in (16, 256)
}


def reference_config(config: GemmaConfig) -> transformers.GemmaConfig:
    """The same architecture for `transformers`, with attention spelled out."""
    fields = dataclasses.asdict(config)
    for name in ("sliding_window", "layer_types"):
        fields.pop(name)
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    return transformers.GemmaConfig(**fields, rope_parameters=rope, attn_implementation="eager")


def reference_model(config: GemmaConfig, seed: int = 0) -> transformers.GemmaForCausalLM:
    """A `transformers` Gemma in float32 whose weights keep activations near 1; norm weights are random too."""
    model = transformers.GemmaForCausalLM(reference_config(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(-0.5, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def cast_reference(model: transformers.GemmaForCausalLM, dtype: torch.dtype) -> transformers.GemmaForCausalLM:
    """Cast as `from_pretrained(dtype=...)` does: rotary frequencies stay in float32."""
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    model.model.rotary_emb.inv_freq = inv_freq
    return model


def ours_from(reference: transformers.GemmaForCausalLM, config: GemmaConfig, impl: str) -> Gemma:
    """Our Gemma with the reference's weights and dtype."""
    state = reference.state_dict()
    del state["lm_head.weight"]
    model = Gemma(config, impl).to(reference.dtype)
    model.load_state_dict(state)
    return model


def pair(config: GemmaConfig, impl: str, seed: int = 0) -> tuple[Gemma, transformers.GemmaForCausalLM]:
    """Our model and the reference with the same random float32 weights."""
    reference = reference_model(config, seed)
    return ours_from(reference, config, impl), reference


def random_ids(config: GemmaConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the padding id."""
    return torch.randint(1, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def summed_loss(logits: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy by PyTorch, summed, of at least float32 precision."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), ignore_index=-100, reduction="sum")


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of ``loss`` for every parameter, by name."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float = 1e-5, scale: float | None = None
) -> None:
    """The largest error is within ``tolerance`` of ``scale``, the largest expected value if not given."""
    assert actual.shape == expected.shape, what
    error = (actual.double() - expected.double()).abs().max().item()
    scale = scale or expected.abs().max().item()
    assert error <= tolerance * scale, f"{what}: error {error:.2e} beside values up to {scale:.2e}"


def assert_gradients_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same parameters, each with a close gradient.

    A document of one token gives q_proj and k_proj a gradient of exactly zero: there, rounding is measured against the
    largest gradient of all.
    """
    assert actual.keys() == expected.keys()
    largest = {name: gradient.abs().max().item() for name, gradient in expected.items()}
    assert max(largest.values()) > 0
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, name, scale=largest[name] or max(largest.values()))
