"""Folders that we write: transformers loads them, they appear whole or not at all, and mistakes are explained."""

from __future__ import annotations

import dataclasses
import json
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
import transformers
from safetensors.torch import load_file
from upath import UPath

from gemma_xla.errors import UserError
from gemma_xla.hf import HfReader, export, load_model, read_config
from tests.hf.conftest import CONFIG, Weights
from tests.reference import assert_close, random_ids


def load_theirs(folder: Path) -> transformers.GemmaForCausalLM:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


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


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_one_tensor_is_in_memory_at_a_time(weights, tmp_path, size):
    buffers: list[weakref.ref] = []

    class Recorder(Weights):
        def copy_to(self, name, out, index=None):
            assert all(buffer() is None for buffer in buffers)
            buffers.append(weakref.ref(out))
            super().copy_to(name, out, index)

    export(Recorder(weights.tensors), CONFIG, tmp_path / "model", max_shard_size=size)
    assert len(buffers) == len(weights.tensors)


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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_of_an_export_is_equal_in_every_byte(weights, tmp_path, size, dtype):
    options = {"dtype": dtype, "max_shard_size": size}
    first = export(weights, CONFIG, tmp_path / "first", **options)
    second = export(HfReader(first), read_config(first), tmp_path / "second", **options)
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


class Failing(Weights):
    """A reader that raises at its eighth tensor."""

    def __init__(self, weights: Weights, error: BaseException) -> None:
        super().__init__(weights.tensors)
        self.error = error
        self.left = 7

    def copy_to(self, name, out, index=None):
        if not self.left:
            raise self.error
        self.left -= 1
        super().copy_to(name, out, index)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [UserError("shard: cannot be read"), KeyboardInterrupt()], ids=["file", "ctrl-c"])
def test_a_failure_leaves_nothing_behind(weights, tmp_path, existing, error):
    out = tmp_path / "model"
    if existing:
        export(weights, CONFIG, out, card="old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(type(error)) as raised:
        export(Failing(weights, error), CONFIG, out, max_shard_size="50KB", card="new", overwrite=True)
    assert raised.value is error
    assert sorted(tmp_path.rglob("*")) == before
    assert not existing or (out / "README.md").read_text() == "old"


def test_a_disk_that_takes_no_more_is_one_clear_error(weights, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Not a disk that is full, but the system refuses in the same way to write on.
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            export(weights, CONFIG, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"{tmp_path / 'model'}: File too large; make room, or export to another folder that you may write to: nothing "
        "was exported"
    )
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(
        UserError, match="Not a directory; make room, or export to another folder that you may write to"
    ):
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


# Elsewhere than on a local disk.


@pytest.fixture
def url() -> Iterator[str]:
    """A place in memory that fsspec opens as it would a bucket."""
    yield "memory://exports/run/model"
    fsspec.filesystem("memory").rm("/exports", recursive=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_an_export_to_a_url_is_the_same(weights, tmp_path, url, size):
    options = {"max_shard_size": size, "card": "# Card"}
    local = export(weights, CONFIG, tmp_path / "model", **options)
    out = export(weights, CONFIG, url, **options)
    assert (str(out), files(out)) == (url, files(local))
    # A folder is a model once its config is there.
    assert list(fsspec.filesystem("memory").store)[-1].endswith("/config.json")
    again = export(HfReader(url), read_config(url), tmp_path / "again", **options)
    assert files(again) == files(local)
    ids = random_ids(CONFIG, 1, 9)
    assert torch.equal(load_model(url)(ids), load_model(local)(ids))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_a_url_leaves_nothing_behind(weights, url, error):
    (UPath(url).parent / "config.yaml").write_text("of the run")
    kind, message = (UserError, "No space left on device; make room") if error.args else (KeyboardInterrupt, None)
    with pytest.raises(kind, match=message):
        export(Failing(weights, error), CONFIG, url, max_shard_size="50KB")
    assert [path.name for path in UPath(url).parent.iterdir()] == ["config.yaml"]


def test_a_model_at_a_url_is_replaced_as_a_whole(weights, url):
    out = export(weights, CONFIG, url, max_shard_size="50KB")
    with pytest.raises(UserError, match="model: the folder is not empty"):
        export(weights, CONFIG, url)
    with pytest.raises(UserError, match="model: it is read from, so it cannot be overwritten"):
        export(HfReader(url), CONFIG, url, overwrite=True)
    export(weights, CONFIG, url, overwrite=True)
    assert sorted(files(out)) == ["config.json", "generation_config.json", "model.safetensors"]
    # As an export leaves it that was killed.
    (out / "config.json").unlink()
    export(weights, CONFIG, url, overwrite=True)
    (out / "config.json").unlink()
    (out / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="something else than a model"):
        export(weights, CONFIG, url, overwrite=True)
