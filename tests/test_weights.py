"""Whatever has weights opens: folders, runs, runs with LoRA, adapters; and what does not is explained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

from gemma_xla import hf
from gemma_xla.checkpoint import open_run
from gemma_xla.errors import UserError
from gemma_xla.infer.text import open_model
from gemma_xla.weights import base_name, fingerprint, open_checkpoint, open_weights, resolve_base
from tests.adapters import make_lora_run
from tests.hf.conftest import Weights
from tests.reference import assert_close, random_ids

LORA = "lora={rank: 4, alpha: 6.0, use_dora: true, target_modules: [q_proj, v_proj, down_proj]}"


@pytest.fixture
def base(finished_run, tmp_path) -> Path:
    """The base of a LoRA run, free to be moved or spoilt."""
    return Path(shutil.copytree(finished_run / "export", tmp_path / "base"))


@pytest.fixture
def lora_run(base, tiny_config, tokenizer_folder, tmp_path) -> Path:
    config = tiny_config(tmp_path / "run", f"model={{init_from: {base}}}", LORA)
    return make_lora_run(config, tokenizer_folder, {10: 3.0, 20: 1.5, 30: 2.0})


@pytest.fixture
def adapter(lora_run, base, tmp_path) -> Path:
    """What the LoRA run's newest checkpoint is as a peft adapter."""
    opened = open_checkpoint(lora_run)
    return hf.export_adapter(opened.reader, opened.config.lora, tmp_path / "adapter", base_model=str(base))


def same(one: hf.TensorReader, other: hf.TensorReader) -> bool:
    return set(one.names()) == set(other.names()) and all(
        torch.equal(one.read(name), other.read(name)) for name in one.names()
    )


def test_a_run_and_its_export_are_the_same(finished_run):
    run, folder = open_weights(finished_run), open_weights(str(finished_run / "export"))
    assert same(run.reader, folder.reader)
    assert run.config == folder.config
    assert run.tokenizer == finished_run / "tokenizer"
    assert folder.tokenizer == finished_run / "export"
    assert run.description == f"{finished_run}, step 60"


def test_a_run_with_lora_and_its_adapter_are_what_peft_makes_of_them(lora_run, base, adapter):
    run, folder = open_weights(lora_run), open_weights(adapter)
    assert same(run.reader, folder.reader)
    assert run.config == folder.config == hf.read_config(base)
    assert (run.tokenizer, folder.tokenizer) == (lora_run / "tokenizer", base)  # the adapter has none
    for path in base.glob("tokenizer*"):
        shutil.copy(path, adapter)
    assert open_weights(adapter).tokenizer == adapter
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    ids = random_ids(run.config, 2, 9)
    plain = model(ids).logits
    expected = peft.PeftModel.from_pretrained(model, adapter).eval()(ids).logits
    assert (expected - plain).abs().max() > 0.1
    for source in (lora_run, adapter):
        opened, tokenizer, _ = open_model(source)
        assert_close(opened.cpu()(ids), expected)
        assert tokenizer.decode(tokenizer("he was")["input_ids"], skip_special_tokens=True) == "he was"


def test_a_checkpoint_is_opened_by_its_step(lora_run):
    newest, first = open_checkpoint(lora_run), open_checkpoint(lora_run, 10)
    assert (newest.step, first.step) == (30, 10)
    assert not same(newest.reader, first.reader)
    assert not same(newest.weights().reader, first.weights().reader)
    assert same(newest.reader, open_run(lora_run)[0])
    with pytest.raises(UserError, match="step-00000007 is not there or not complete; there are 10, 20, 30"):
        open_checkpoint(lora_run, 7)
    tensors = lora_run / "checkpoints" / "step-00000010" / "tensors-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(UserError, match="bytes long, not"):
        open_checkpoint(lora_run, 10)


def test_a_base_that_is_gone_or_another_is_refused(lora_run, base, adapter, tmp_path):
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError) as error:
        open_weights(lora_run)
    assert str(error.value).startswith(f"{lora_run}: its base cannot be read: model.init_from: {base}: no such folder")
    assert str(error.value).endswith(
        f"or, if it has moved, run `gemma-xla export {lora_run} OUT` and set base_model_name_or_path in "
        "OUT/adapter_config.json"
    )
    path = adapter / "adapter_config.json"
    with pytest.raises(UserError) as error:
        open_weights(adapter)
    assert str(error.value).startswith(f"{path}: base_model_name_or_path: {base}: no such folder")
    assert str(error.value).endswith("; or set it to where the base model is now")
    # The way out.
    changed = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "moved")}
    path.write_text(json.dumps(changed))
    merged = open_weights(adapter).reader
    path.write_text(json.dumps(changed | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="base_model_name_or_path is missing; set it to the folder or hub id"):
        open_weights(adapter)

    hf.export(merged, hf.read_config(tmp_path / "moved"), base, dtype="float32")
    with pytest.raises(UserError, match="no longer holds the weights that the adapter was trained on; bring them back"):
        open_weights(lora_run)


def test_a_base_of_another_size_is_refused(lora_run, base, adapter):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"head_dim": 8}))
    for folder in (lora_run, adapter):
        with pytest.raises(UserError, match=r"q_proj.weight has shape \[64, 48\]; the config asks for \[32, 48\]"):
            open_weights(folder)


def test_what_is_nothing_is_explained(tmp_path):
    with pytest.raises(UserError, match="none: no such folder, and"):
        open_weights(tmp_path / "none")
    with pytest.raises(UserError, match="config.json: No such file or directory; give the folder of a Hugging Face"):
        open_weights(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint below checkpoints/"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="File name too long.; check the path"):
        open_weights("a" * 300)


# What training starts from.


def test_the_base_of_a_run(finished_run, lora_run, adapter, base, tmp_path):
    for folder in (finished_run, base, lora_run, adapter):
        assert resolve_base(str(folder), lora=False) == folder
    assert resolve_base(str(base), lora=True) == base
    assert resolve_base(str(finished_run), lora=True) == finished_run / "export"
    with pytest.raises(UserError) as error:
        resolve_base(str(lora_run), lora=True)
    assert str(error.value) == (
        f"{lora_run}: it is a run without the folder export/, which an adapter needs as its base; run `gemma-xla "
        f"export {lora_run} OUT` (a run with LoRA: add --merge) and name OUT"
    )
    with pytest.raises(UserError, match="beside which no other can be trained; run `gemma-xla export .* OUT --merge`"):
        resolve_base(str(adapter), lora=True)
    for lora in (True, False):
        with pytest.raises(UserError, match="no-one/no-model: no such folder, and"):
            resolve_base("no-one/no-model", lora)


def test_what_a_base_is_called(finished_run, base, tmp_path, monkeypatch):
    assert base_name("google/gemma-2b", lora=True) == "google/gemma-2b"
    assert base_name(str(finished_run), lora=True) == str(finished_run / "export")
    assert base_name(str(finished_run), lora=False) == str(finished_run)
    monkeypatch.chdir(tmp_path)
    assert base_name("base", lora=True) == str(base)


# Fingerprints.


def changed(tensors: dict[str, torch.Tensor], at: tuple[int, ...]) -> dict[str, torch.Tensor]:
    matrix = tensors["matrix"].clone()
    matrix[at] += 1
    return tensors | {"matrix": matrix}


def test_a_fingerprint_tells_models_apart():
    tensors = {"matrix": torch.arange(600.0 * 400).view(600, 400), "vector": torch.arange(3.0), "one": torch.ones(())}
    same_as = fingerprint(Weights({name: tensors[name] for name in reversed(tensors)}))
    others = [
        changed(tensors, (0, 0)),
        changed(tensors, (0, 255)),
        changed(tensors, (599, 399)),
        tensors | {"vector": tensors["vector"].double()},
        tensors | {"vector": torch.arange(4.0)},
        tensors | {"one": torch.zeros(())},
        {"one" if name == "one" else f"{name}s": tensor for name, tensor in tensors.items()},
        {name: tensor for name, tensor in tensors.items() if name != "vector"},
    ]
    prints = [fingerprint(Weights(other)) for other in (tensors, *others)]
    assert prints[0] == same_as
    assert len(set(prints)) == len(prints)


def test_a_fingerprint_is_that_of_the_tensors_not_of_the_files(base, tmp_path):
    config, reader = hf.read_config(base), hf.HfReader(base)
    one = hf.export(reader, config, tmp_path / "one", dtype="bfloat16")
    many = hf.export(reader, config, tmp_path / "many", dtype="bfloat16", max_shard_size="20KB", card="# Card")
    assert len(list(many.glob("*.safetensors"))) > 1
    assert fingerprint(hf.HfReader(one)) == fingerprint(hf.HfReader(many)) != fingerprint(reader)


def test_a_fingerprint_reads_little(base):
    class Counting(hf.HfReader):
        read_elements = 0

        def read(self, name, index=None):
            part = super().read(name, index)
            Counting.read_elements += part.numel()
            return part

    reader = Counting(base)
    Counting.read_elements = 0
    fingerprint(reader)
    assert Counting.read_elements <= 512 * len(reader.names())
