"""Model folders: `transformers` loads what we write, we load what it writes, and mistakes are explained."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from gemma_xla.errors import UserError
from gemma_xla.hf import HfReader, copy_tokenizer, export, load_model, model_card, read_config, resolve, writer
from gemma_xla.model.config import preset
from tests.reference import SHAPES, assert_close, ours_from, random_ids, reference_config, reference_model

# Token ids differ from the defaults, as the other constants of SHAPES do.
CONFIG = dataclasses.replace(SHAPES["gqa-16"], pad_token_id=3, eos_token_id=4, bos_token_id=5, initializer_range=0.03)
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


class Weights:
    """A reader of tensors in memory, as a checkpoint might be."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name, index=None):
        return self.tensors[name][index or ...]


@pytest.fixture(scope="module")
def theirs():
    return reference_model(CONFIG)


@pytest.fixture(scope="module")
def weights(theirs):
    return Weights(ours_from(theirs, CONFIG, "sdpa").state_dict())


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    """A folder that `transformers` wrote; copy it before changing it."""
    path = tmp_path_factory.mktemp("hf") / "theirs"
    theirs.save_pretrained(path)
    return path


def edit(folder: Path, tmp_path: Path, **changes) -> Path:
    """A copy of the folder with other values in config.json; ... removes the key."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    raw = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return copy


def load_theirs(folder: Path) -> transformers.GemmaForCausalLM:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


# Export.


# At 1KB each matrix has its own file and the norms share one.
@pytest.mark.parametrize(("size", "shards"), [("5GB", 1), ("50KB", 5), ("1KB", 16)])
def test_transformers_loads_an_export(theirs, weights, tmp_path, size, shards):
    out = export(weights, CONFIG, tmp_path / "new" / "model", dtype="float32", max_shard_size=size)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) == shards
    assert (out / "model.safetensors.index.json").exists() == (shards > 1)
    stored = {name: t for file in files for name, t in load_file(out / file).items()}
    assert stored.keys() == weights.tensors.keys()  # no lm_head.weight
    model = load_theirs(out)
    assert type(model) is transformers.GemmaForCausalLM
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = random_ids(CONFIG, 2, 9)
    assert_close(model(ids).logits, theirs(ids).logits)
    assert_close(load_model(out)(ids), theirs(ids).logits)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_shards_keep_their_size(weights, tmp_path, dtype, width):
    out = export(weights, CONFIG, tmp_path / "model", dtype=dtype, max_shard_size="0.05 MB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == width * sum(t.numel() for t in weights.tensors.values())
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= 50_000
        assert {name for name, file in index["weight_map"].items() if file == path.name} == tensors.keys()


def test_one_shard_is_in_memory_at_a_time(weights, tmp_path, monkeypatch):
    reads = []

    class Recorder(Weights):
        def read(self, name, index=None):
            reads.append(name)
            return super().read(name, index)

    def save(tensors, *args, **kwargs):
        assert reads == list(tensors)
        reads.clear()
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(writer, "save_file", save)
    export(Recorder(weights.tensors), CONFIG, tmp_path / "model", max_shard_size="50KB")
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_export_rounds_exactly(weights, tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    out = export(weights, CONFIG, tmp_path / "model", dtype=name)
    stored = load_file(out / "model.safetensors")
    for name, tensor in weights.tensors.items():
        assert torch.equal(stored[name], tensor.to(dtype)), name
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == dtype


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_export_of_an_export_is_equal_in_every_byte(weights, tmp_path, size):
    first = export(weights, CONFIG, tmp_path / "first", max_shard_size=size)
    second = export(HfReader(first), read_config(first), tmp_path / "second", max_shard_size=size)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_config_json(weights, tmp_path):
    out = export(weights, CONFIG, tmp_path / "model")
    assert json.loads((out / "config.json").read_text()) == {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "initializer_range": 0.03,
        "pad_token_id": 3,
        "eos_token_id": 4,
        "bos_token_id": 5,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.pad_token_id, generation.eos_token_id, generation.bos_token_id) == (3, 4, 5)


def test_other_files(weights, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "secret.txt"):
        (tokenizer / name).write_bytes(name.encode())
    out = export(weights, CONFIG, tmp_path / "model", tokenizer=tokenizer, card="# Card: ä\n")
    copied = ["chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    written = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == sorted(copied + written)
    assert all((out / name).read_text() == name for name in copied)
    assert (out / "README.md").read_text(encoding="utf-8") == "# Card: ä\n"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # whoever may read one may read all


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_behind(weights, tmp_path, monkeypatch, existing):
    out = tmp_path / "model"
    if existing:
        export(weights, CONFIG, out, card="old")
    before = sorted(tmp_path.rglob("*"))
    calls = []

    def fail_at_the_second(tensors, *args, **kwargs):
        calls.append(tensors)
        if len(calls) == 2:
            raise OSError("No space left on device")
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(writer, "save_file", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        export(weights, CONFIG, out, max_shard_size="50KB", card="new", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert not existing or (out / "README.md").read_text() == "old"


def test_what_a_killed_export_left_is_cleared(weights, tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    out = export(weights, CONFIG, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not list(out.glob("model-*"))


def test_only_a_model_folder_is_overwritten_and_only_on_request(weights, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    export(weights, CONFIG, out, max_shard_size="50KB")  # an empty folder is free
    with pytest.raises(UserError, match="model: the folder is not empty"):
        export(weights, CONFIG, out)
    export(weights, CONFIG, out, overwrite=True)
    assert not (out / "model.safetensors.index.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    # The source itself may be what is replaced.
    export(HfReader(out), CONFIG, out, overwrite=True)
    assert_close(HfReader(out).read("model.norm.weight"), weights.read("model.norm.weight").bfloat16())

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="something else than a model"):
        export(weights, CONFIG, tmp_path / "home", overwrite=True)
    with pytest.raises(UserError, match="it is a file"):
        export(weights, CONFIG, tmp_path / "home" / "thesis.txt", overwrite=True)
    with pytest.raises(UserError, match="export to a folder you may write to"):
        export(weights, CONFIG, tmp_path / "home" / "thesis.txt" / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat17"}, "dtype is 'bfloat17'; it must be one of float32, bfloat16, float16 (did you mean"),
        ({"max_shard_size": "5 gigabytes"}, "max_shard_size is '5 gigabytes'; write a number"),
        ({"max_shard_size": "0GB"}, "max_shard_size is '0GB'"),
        ({"max_shard_size": "-1GB"}, "max_shard_size is '-1GB'"),
        ({"max_shard_size": "nanGB"}, "max_shard_size is 'nanGB'"),
        ({"tokenizer": Path("no/such")}, "no/such: neither tokenizer.model nor tokenizer.json is there"),
    ],
)
def test_impossible_export_options_are_explained(weights, tmp_path, options, message):
    with pytest.raises(UserError) as error:
        export(weights, CONFIG, tmp_path / "model", **options)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_sliding_layers_cannot_be_exported(weights, tmp_path):
    sliding = dataclasses.replace(CONFIG, sliding_window=8, layer_types=("sliding_attention", "full_attention"))
    with pytest.raises(UserError, match="layer_types has sliding layers"):
        export(weights, sliding, tmp_path / "model")
    full = dataclasses.replace(CONFIG, layer_types=("full_attention",) * 2)
    assert read_config(export(weights, full, tmp_path / "model")) == CONFIG


# Loading.


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_loads_what_transformers_saved(theirs, tmp_path, size):
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "50KB")
    model = load_model(tmp_path)
    assert model.config == CONFIG
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    ids = random_ids(CONFIG, 2, 9)
    assert_close(model(ids), theirs(ids).logits)
    half = load_model(tmp_path, dtype=torch.bfloat16, attention="reference")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.layers[0].self_attn.impl == "reference"


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_reader_reads_whole_tensors_and_parts(theirs, tmp_path, size):
    theirs.to(torch.float32).save_pretrained(tmp_path, max_shard_size=size)
    reader = HfReader(tmp_path)
    state = theirs.state_dict()
    assert set(reader.names()) == state.keys() - {"lm_head.weight"}
    for name in reader.names():
        assert reader.shape(name) == tuple(state[name].shape)
        assert reader.dtype(name) == torch.float32
        assert torch.equal(reader.read(name), state[name])
    name = "model.layers.1.mlp.gate_proj.weight"
    for index in [(slice(8, 24),), (slice(None), slice(40, 48)), (slice(79, 80), slice(0, 1))]:
        assert torch.equal(reader.read(name, index), state[name][index])
    assert torch.equal(reader.read("model.norm.weight", (slice(5, 7),)), state["model.norm.weight"][5:7])


def test_a_copied_head_is_ignored_and_another_one_refused(theirs, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    ids = random_ids(CONFIG, 1, 9)
    assert_close(load_model(copy)(ids), theirs(ids).logits)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(copy)


BAD_TENSORS = {
    "tensor model.norm.weight is missing": lambda t: t.pop("model.norm.weight"),
    "tensor model.layers.1.input_layernorm.weight (and 8 more) is missing": lambda t: [
        t.pop(name) for name in list(t) if ".layers.1." in name
    ],
    "tensor model.layers.0.self_attn.q_proj.bias does not belong in a Gemma": lambda t: t.update(
        {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    ),
    "model.layers.0.self_attn.q_proj.weight has shape [48, 48]; the config asks for [64, 48]": lambda t: t.update(
        {"model.layers.0.self_attn.q_proj.weight": torch.zeros(48, 48)}
    ),
    "model.norm.weight is stored as I8": lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(folder, tmp_path, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    BAD_TENSORS[message](tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for attempt in (load_model, lambda path: export(HfReader(path), CONFIG, tmp_path / "out")):
        with pytest.raises(UserError) as error:
            attempt(copy)
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_damaged_folders_are_explained(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    shard = tmp_path / "model-00002-of-00005.safetensors"
    shutil.copyfile(tmp_path / "model-00001-of-00005.safetensors", shard)
    with pytest.raises(UserError, match=r"00002.*is not in it, though model.safetensors.index.json says so"):
        load_model(tmp_path)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="00002-of-00005.safetensors: cannot be read"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="00002-of-00005.safetensors: cannot be read"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor model.safetensors.index.json is there"):
        load_model(tmp_path)


# config.json.


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


# The hub.


def test_hub_models_come_from_the_cache_when_offline(theirs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--someone--tiny-gemma", "0123456789" * 4
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert resolve("someone/tiny-gemma") == repo / "snapshots" / commit
    ids = random_ids(CONFIG, 1, 9)
    assert_close(load_model("someone/tiny-gemma")(ids), theirs(ids).logits)
    for name in ("someone/else", "no/such/folder", "./nothing"):
        with pytest.raises(UserError, match=r"no such folder.*accept its terms.*hf auth login"):
            load_model(name)


def test_a_folder_needs_no_hub(folder):
    assert resolve(str(folder)) == folder


def test_a_tokenizer_is_copied_whole_or_not_at_all(tmp_path):
    source, out = tmp_path / "source", tmp_path / "run" / "tokenizer"
    source.mkdir()
    with pytest.raises(UserError, match="source: neither tokenizer.model nor tokenizer.json is there"):
        copy_tokenizer(source, out)
    assert not out.exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (source / name).write_text(name)
    copy_tokenizer(source, out)
    assert {p.name: p.read_text() for p in out.iterdir()} == {n: n for n in ("tokenizer.json", "tokenizer_config.json")}
    assert [p.name for p in out.parent.iterdir()] == ["tokenizer"]


# The model card.


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
