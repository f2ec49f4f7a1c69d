"""Exported folders open in programs that are not ours, and say the same there.

Log-probabilities over the whole vocabulary are compared, teacher-forced. Some of the programs come from a package
registry, as the tests run: pip must be able to reach one.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemma_xla.data.tokenizer import load_tokenizer
from gemma_xla.hf import HfReader, export
from gemma_xla.model.config import GemmaConfig
from gemma_xla.train.verify import load_with_peft
from recipes.finetune import main
from tests.conftest import VOCAB_SIZE
from tests.reference import pair, random_ids

pytestmark = pytest.mark.slow

# As 2B, as 7B (heads * head_dim is not hidden_size), and in between with wide heads. rope_theta stays Gemma's own: the
# converters of CTranslate2 and llama.cpp look at no other.
_MQA = GemmaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=128,
    rms_norm_eps=1e-3,
)
_MHA = dataclasses.replace(_MQA, hidden_size=96, num_key_value_heads=4)
MODELS = {
    "mqa": _MQA,
    "mqa in shards": _MQA,
    "mha": _MHA,
    "head_dim 256": dataclasses.replace(_MHA, num_key_value_heads=2, head_dim=256),
}
# An adapter that a run of ours trained on the first of these, merged into it.
LORA = "lora, merged"
NAMES = [*MODELS, LORA]
IDS = [2, *random_ids(_MQA, 79).tolist()]
TEXT = "<start_of_turn>user\nit is  for the hat, é 日本 12<end_of_turn>\n\n<b>his</b> boat"
NEWLINE = 108

# 4.38.0 is the first release with Gemma, but runs it only where heads * head_dim is hidden_size; 4.38.1 runs all.
TRANSFORMERS = {"4.38.0": ["mqa", "mqa in shards"], "4.38.1": list(MODELS)}
BESIDE_TRANSFORMERS = ["tokenizers==0.15.2", "huggingface_hub==0.36.2"]
# Its source archive carries llama.cpp's own converter.
LLAMA_CPP = "llama-cpp-python==0.3.36"
CONVERTER = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")


class Exported(NamedTuple):
    folder: Path
    # Ours, after each of IDS: [T, V]. Of the merged adapter, those of peft on the adapter itself.
    log_probs: np.ndarray


@pytest.fixture(scope="module")
def exported(tokenizer_folder, tiny_config, tmp_path_factory) -> dict[str, Exported]:
    parent = tmp_path_factory.mktemp("exported")
    made = {}
    for name, config in MODELS.items():
        model, _ = pair(config, "reference")
        source = tmp_path_factory.mktemp("source")
        save_file(model.state_dict(), source / "model.safetensors")
        size = "200KB" if name.endswith("in shards") else "5GB"
        folder = export(
            HfReader(source),
            config,
            parent / name,
            tokenizer=tokenizer_folder,
            dtype="float32",
            max_shard_size=size,
        )
        with torch.no_grad():
            made[name] = Exported(folder, model(torch.tensor([IDS]))[0].log_softmax(-1).numpy())
    assert (made["mqa in shards"].folder / "model.safetensors.index.json").exists()
    return made | {LORA: merged(tiny_config, made["mqa"], parent / "run")}


def merged(tiny_config, base: Exported, folder: Path) -> Exported:
    """What a run with LoRA leaves: its merged model, and what peft says with its adapter."""
    settings = ["lora={rank: 4, alpha: 16}", "export={merged: true, dtype: float32}"]
    main(tiny_config(folder, f"model={{init_from: {base.folder}}}", *settings))
    with torch.no_grad():
        logits = load_with_peft(base.folder, folder / "adapter")(torch.tensor([IDS])).logits
    log_probs = logits[0].log_softmax(-1).numpy()
    assert np.abs(log_probs - base.log_probs).max() > 0.5
    return Exported(folder / "export", log_probs)


@pytest.fixture(scope="module")
def converter(tmp_path_factory) -> Path:
    """llama.cpp's script that turns a model folder into a GGUF file."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, LLAMA_CPP)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/vendor/llama.cpp/")
            if name.startswith(CONVERTER):
                tar.extract(member.replace(name=name), folder, filter="data")
    return folder / "convert_hf_to_gguf.py"


def pip(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        command = " ".join(map(str, arguments))
        pytest.fail(f"this test needs a package registry, and `pip {command}` failed:\n{done.stderr[-3000:]}")


def run(*command: str | Path, **settings: Any) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max()
    print(f"largest difference {error:.1e}")
    assert error <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_ctranslate2(exported, name, tmp_path):
    import ctranslate2

    folder, expected = exported[name]
    path = ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "model"))
    generator = ctranslate2.Generator(path, compute_type="float32", intra_threads=1)
    (log_probs,) = np.array(generator.forward_batch([IDS], return_log_probs=True))
    assert_close(log_probs, expected, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp(exported, converter, name, tmp_path):
    folder, expected = exported[name]
    server = serve(folder, converter, tmp_path)
    log_probs = np.array([next_log_probs(server, IDS[:length]) for length in range(1, len(IDS) + 1)])
    # Its GELU is a table in half precision.
    assert_close(log_probs, expected, 5e-3)


def test_llama_cpp_reads_the_same_tokens(exported, converter, tokenizer_folder, tmp_path):
    server = serve(exported["mqa"].folder, converter, tmp_path)
    connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc)
    connection.request("POST", "/tokenize", json.dumps({"content": TEXT, "add_special": True}))
    assert json.load(connection.getresponse())["tokens"] == load_tokenizer(tokenizer_folder)(TEXT).input_ids


def serve(folder: Path, converter: Path, tmp_path: Path) -> Any:
    """llama.cpp's server on the folder's model; keys and values are not rounded to half precision."""
    import xllamacpp

    gguf = tmp_path / "model.gguf"
    run(converter, folder, "--outtype", "f32", "--outfile", gguf)
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = len(IDS) + 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def next_log_probs(server: Any, prompt: list[int]) -> np.ndarray:
    """Log-probabilities ``[V]`` of the token after the prompt."""
    # The answer has them only when the token it chose has a text, so the choice is made here; they are the model's own.
    request = {"prompt": prompt, "max_tokens": 1, "logprobs": VOCAB_SIZE, "logit_bias": {str(NEWLINE): 1000}}
    (choice,) = server.handle_completions(request)["choices"]
    found = {entry["id"]: entry["logprob"] for entry in choice["logprobs"]["content"][0]["top_logprobs"]}
    return np.array([found[token] for token in range(VOCAB_SIZE)])


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_first_transformers_with_gemma(exported, version, tokenizer_folder, tmp_path):
    site, out = tmp_path / "site", tmp_path / "answers.pt"
    pip("install", "--no-deps", "--no-compile", "--target", site, f"transformers=={version}", *BESIDE_TRANSFORMERS)
    script = Path(__file__).parent / "elsewhere" / "run_transformers.py"
    folders = {name: str(exported[name].folder) for name in TRANSFORMERS[version]}
    asked = json.dumps({"ids": IDS, "text": TEXT})
    run(script, out, *folders.values(), input=asked, env=os.environ | {"PYTHONPATH": str(site)})

    said = torch.load(out)
    assert said["version"] == version
    for name, folder in folders.items():
        assert_close(said["answers"][folder]["log_probs"].numpy(), exported[name].log_probs, 1e-5)
        assert said["answers"][folder]["tokens"] == load_tokenizer(tokenizer_folder)(TEXT).input_ids
