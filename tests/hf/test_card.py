"""The model card."""

from __future__ import annotations

import huggingface_hub
import pytest
import yaml

from gemma_xla.config import LoraSection
from gemma_xla.hf import model_card
from tests.hf.conftest import CONFIG


def test_model_card():
    text = model_card(
        "someone/tiny",
        CONFIG,
        sources=["data/*.txt", "stdlib"],
        metrics={"steps": 300, "eval loss": 2.5},
        run_config="log:\n  sample_prompt: '```'\n",
    )
    card = huggingface_hub.ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma"],
    }
    parameters = 101 * 48 + 2 * (48 * 16 * (4 + 2 + 2 + 4) + 3 * 48 * 80 + 2 * 48) + 48
    for line in (
        "# tiny",
        "A Gemma trained from scratch with PyTorch by gemma_xla.",
        f"| parameters | {parameters:,} |",
        "| head_dim | 16 |",
        'model = AutoModelForCausalLM.from_pretrained("someone/tiny")',
        "- data/*.txt",
        "| eval loss | 2.5 |",
        "  sample_prompt: '```'",
    ):
        assert line in card.text.splitlines()


def test_model_card_of_a_fine_tuned_model():
    text = model_card("out/mine", CONFIG, base_model="google/gemma-2b", license="gemma")
    front_matter = yaml.safe_load(text.split("---")[1])
    assert (front_matter["base_model"], front_matter["license"]) == ("google/gemma-2b", "gemma")
    assert "# mine\n\nA Gemma fine-tuned from `google/gemma-2b` with PyTorch" in text
    assert not any(word in text for word in ("Training data", "Results", "<details>"))


def test_model_card_of_an_adapter():
    lora = LoraSection(rank=8, alpha=12.5, target_modules=["q_proj", "v_proj"])
    card = huggingface_hub.ModelCard(model_card("me/mine", CONFIG, base_model="google/gemma-2b", lora=lora))
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["gemma", "lora"],
        "base_model": "google/gemma-2b",
    }
    for line in (
        "A LoRA adapter for `google/gemma-2b`, trained with PyTorch by gemma_xla.",
        'base = AutoModelForCausalLM.from_pretrained("google/gemma-2b")',
        'model = PeftModel.from_pretrained(base, "me/mine")',
        "| rank | 8 |",
        "| alpha | 12.5 |",
        "| target_modules | q_proj, v_proj |",
        "| hidden_size | 48 |",
    ):
        assert line in card.text.splitlines()


@pytest.mark.parametrize("folder", ["/data/base", "gs://bucket/base", "~/base"])
def test_a_folder_is_no_base_to_the_hub(folder):
    text = model_card("out/mine", CONFIG, base_model=folder)
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert f"A Gemma fine-tuned from `{folder}`" in text
