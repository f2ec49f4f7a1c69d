"""config.json of every age is read, and what cannot be a Gemma is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gemma_xla.errors import UserError
from gemma_xla.hf import read_config
from gemma_xla.model.config import preset
from tests.hf.conftest import CONFIG
from tests.reference import reference_config

GEMMA_2B = {  # as published, February 2024
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}


def edit(folder: Path, tmp_path: Path, **changes) -> Path:
    """A copy of the folder with other values in config.json; ... removes the key."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    raw = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return copy


def test_reads_configs_of_every_age(tmp_path):
    reference_config(CONFIG).save_pretrained(tmp_path)
    assert read_config(tmp_path) == CONFIG
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GEMMA_2B))
    assert read_config(tmp_path) == preset("gemma-2b")
    newer = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "eos_token_id": [7, 8]}
    path.write_text(json.dumps(GEMMA_2B | newer | {"rope_parameters": {"rope_theta": 77.0}, "pad_token_id": None}))
    assert read_config(tmp_path) == preset("gemma-2b").replace(eos_token_id=7, rope_theta=77.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; only 'gemma' (Gemma 1)"),
        ({"model_type": ...}, "model_type is None"),
        ({"head_dim": ..., "vocab_size": None}, "vocab_size, head_dim missing"),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; only True"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; only 'gelu_pytorch_tanh'"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is {'type'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type is 'linear'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; only None"),
        ({"hidden_size": "48"}, "hidden_size is '48'; it must be of type int"),
        ({"head_dim": 15}, "head_dim is 15; rotary embeddings need an even number"),
        ({"num_key_value_heads": 3}, "num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
        ({"eos_token_id": "<eos>"}, "eos_token_id is '<eos>'; it must be a token id"),
    ],
)
def test_configs_that_cannot_be_read_are_explained(folder, tmp_path, changes, message):
    copy = edit(folder, tmp_path, **changes)
    with pytest.raises(UserError) as error:
        read_config(copy)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{copy / 'config.json'}: ")


def test_config_files_that_are_none_are_explained(tmp_path):
    with pytest.raises(UserError, match="config.json: No such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json: it must hold a JSON object"):
        read_config(tmp_path)
