"""Folders that others wrote: we load what transformers saves, in whole or in part, and say what is damaged."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_xla.errors import UserError
from gemma_xla.hf import HfReader, copy_tokenizer, export, load_model, resolve
from tests.hf.conftest import CONFIG
from tests.reference import assert_close, random_ids


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
