"""Folders that others wrote: we load what transformers saves, in whole or in part, and say what is damaged."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    "model.norm.weight is stored as int8; use one of float64, float32, bfloat16, float16": lambda t: t.update(
        {"model.norm.weight": torch.ones(48, dtype=torch.int8)}
    ),
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
        # What is missing is in no file.
        assert "is missing" in message or str(error.value).startswith(f"{copy / 'model.safetensors'}: ")
    assert not (tmp_path / "out").exists()


def edit_index(folder: Path, **changes: Any) -> None:
    """Change what the index says of tensors; ... takes them out of it."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in (index["weight_map"] | changes).items() if v is not ...}
    path.write_text(json.dumps(index))


def move_out(folder: Path, name: str, to: str) -> None:
    shutil.copytree(folder, folder.parent / "other")
    edit_index(folder, **{name: to})


def replace_shard(folder: Path) -> None:
    shutil.copyfile(folder / "model-00001-of-00005.safetensors", folder / "model-00002-of-00005.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


NORM = "model.norm.weight"
OUTSIDE = "it must be a .safetensors file of the same folder"
DAMAGE = {
    "00002.*is not in it, though model.safetensors.index.json says so": replace_shard,
    "00002-of-00005.safetensors: cannot be read .its header describes": lambda folder: cut(
        folder / "model-00002-of-00005.safetensors"
    ),
    "00002-of-00005.safetensors: cannot be read .there is no such file": lambda folder: (
        folder / "model-00002-of-00005.safetensors"
    ).unlink(),
    "index.json: not valid JSON": lambda folder: cut(folder / "model.safetensors.index.json"),
    "index.json: weight_map is None; download it again": lambda folder: (
        folder / "model.safetensors.index.json"
    ).write_text("{}"),
    "index.json: weight_map is .*; download": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": ["model-00001-of-00005.safetensors"]}'
    ),
    f"{NORM} is in it, though model.safetensors.index.json does not list it": lambda folder: edit_index(
        folder, **{NORM: ...}
    ),
    f"{NORM} is said to be in '../other/model-00001-of-00005.safetensors'; {OUTSIDE}": lambda folder: move_out(
        folder, NORM, "../other/model-00001-of-00005.safetensors"
    ),
    f"{NORM} is said to be in '/etc/passwd'; {OUTSIDE}": lambda folder: edit_index(folder, **{NORM: "/etc/passwd"}),
    f"{NORM} is said to be in 'memory:.*; {OUTSIDE}": lambda folder: edit_index(
        folder, **{NORM: "memory://other.safetensors"}
    ),
    f"{NORM} is said to be in '..'; {OUTSIDE}": lambda folder: edit_index(folder, **{NORM: ".."}),
    f"{NORM} is said to be in 3; {OUTSIDE}": lambda folder: edit_index(folder, **{NORM: 3}),
    "model-6.safetensors: cannot be read .there is no such file": lambda folder: edit_index(
        folder, **{NORM: "model-6.safetensors"}
    ),
    "neither model.safetensors nor model.safetensors.index.json is there": lambda folder: (
        folder / "model.safetensors.index.json"
    ).unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_folders_are_explained(theirs, tmp_path, message):
    folder = tmp_path / "model"
    theirs.save_pretrained(folder, max_shard_size="50KB")
    DAMAGE[message](folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert str(error.value).startswith(str(folder))


def test_nothing_is_unpickled(theirs, tmp_path):
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin, to safetensors first: nothing is ever unpickled"):
        load_model(tmp_path)


def test_of_two_copies_of_a_tensor_the_one_in_the_index_counts(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    other = tmp_path / next(shard for shard in index.values() if shard != index[NORM])
    save_file(load_file(other) | {NORM: torch.zeros(48)}, other, metadata={"format": "pt"})
    reader = HfReader(tmp_path)
    assert torch.equal(reader.read(NORM), theirs.model.norm.weight)
    assert reader.where(NORM) == str(tmp_path / index[NORM])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_weights_of_any_dtype_are_loaded_exactly(folder, tmp_path, dtype, size):
    stored = {name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()}
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    huggingface_hub.save_torch_state_dict(stored, tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "50KB")
    model = load_model(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].float()), name


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
    with pytest.raises(UserError, match=r"^someone/else: no such folder, and not to be had .*offline.*check the name"):
        load_model("someone/else")
    for name in ("no/such/folder", "./nothing"):
        with pytest.raises(UserError, match=f"^{name}: no such folder, and it is not the name of a model"):
            load_model(name)
    with pytest.raises(UserError, match="^memory://no/model: no such folder; check the name$"):
        load_model("memory://no/model")


REFUSALS = {
    "gated": (
        403,
        "GatedRepo",
        "the model is gated; accept its terms on https://huggingface.co/a/gated and run `hf au",
    ),
    "absent": (
        404,
        "RepoNotFound",
        "the Hugging Face hub shows no such model; check the name and, for a private model",
    ),
    "broken": (500, "", "not to be had from the Hugging Face hub or its local cache .*500.*; check the name and the"),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a hub that has no model to give."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, code, _ = REFUSALS[self.path.split("/")[4]]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_refuses_is_explained(hub, monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"^a/{name}: no such folder, and {REFUSALS[name][2]}"):
        resolve(f"a/{name}")


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
