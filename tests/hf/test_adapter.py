"""Adapters in and out: peft loads ours, we read peft's, and a merged model equals what peft computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_xla.config import LoraSection
from gemma_xla.errors import UserError
from gemma_xla.hf import AdapterReader, HfReader, MergedReader, export, export_adapter, model_from, read_config
from gemma_xla.model.config import LORA_TARGETS
from tests.adapters import random_adapter
from tests.hf.conftest import Weights
from tests.reference import SHAPES, assert_close, random_ids, reference_model

# Multi-query and grouped heads; in both, heads * head_dim is not hidden_size.
CONFIGS = [SHAPES["mqa-16"], SHAPES["gqa-16"]]
SECTIONS = {
    "plain": {"rank": 4, "alpha": 6.0, "dropout": 0.1},
    "rslora": {"rank": 4, "alpha": 8.0, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"rank": 3, "alpha": 8.0, "use_dora": True},
    "both": {"rank": 3, "alpha": 4.5, "use_rslora": True, "use_dora": True, "target_modules": ["v_proj", "up_proj"]},
}


def with_peft(base: Path, adapter: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def close(model, expected, config) -> None:
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        assert_close(model(ids), expected(ids).logits)


@pytest.fixture(scope="module", params=CONFIGS, ids=["mqa", "gqa"])
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    reference_model(request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("kind", SECTIONS)
def test_peft_loads_ours_and_computes_what_the_merged_model_does(base, model, tmp_path, kind):
    lora, config = LoraSection(**SECTIONS[kind]), read_config(base)
    adapter = Weights(random_adapter(model, lora))
    out = export_adapter(adapter, lora, tmp_path / "new" / "adapter", base_model=str(base))
    theirs = with_peft(base, out)
    merged = MergedReader(HfReader(base), adapter, lora)
    close(model_from(merged, config, "merged"), theirs, config)
    ids = random_ids(config, 2, 9)
    assert (theirs(ids).logits - model(ids).logits).abs().max() > 0.1  # it does something

    # As a folder of its own, for transformers alone.
    whole = export(merged, config, tmp_path / "whole", dtype="float32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, attn_implementation="eager")
    assert_close(loaded(ids).logits, theirs(ids).logits)

    # And with what peft itself merges.
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        if name != "lm_head.weight":
            assert_close(merged.read(name), tensor, name, tolerance=1e-6)


@pytest.mark.parametrize("kind", SECTIONS)
def test_we_read_what_peft_writes(base, model, tmp_path, kind):
    section = LoraSection(**SECTIONS[kind])
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    theirs.save_pretrained(tmp_path / "adapter")
    reader = AdapterReader(tmp_path / "adapter")
    assert reader.base_model == str(base)
    read = reader.lora.model_dump()
    assert read.pop("target_modules") and set(reader.lora.target_modules) == set(section.target_modules)
    assert read == section.model_dump(exclude={"target_modules"})
    close(
        model_from(MergedReader(HfReader(base), reader, reader.lora), read_config(base), "m"), theirs, read_config(base)
    )


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_parts_of_merged_tensors_are_those_of_the_whole(base, model, kind, monkeypatch):
    monkeypatch.setattr("gemma_xla.hf.merge.CHUNK", 4 * 48 * 7)  # blocks of 7 rows, or of 4 in down_proj
    lora = LoraSection(**SECTIONS[kind])
    merged = MergedReader(HfReader(base), Weights(random_adapter(model, lora)), lora)
    for name in merged.names():
        whole = merged.read(name)
        assert (tuple(whole.shape), whole.dtype) == (merged.shape(name), merged.dtype(name))
        indices = [(slice(5, 17),), (slice(7, 14),), (slice(20, 20),), (slice(-3, None),)]
        if whole.dim() == 2:
            indices += [(slice(None), slice(3, 11)), (slice(8, 9), slice(40, 48))]
        for index in indices:
            out = torch.full(whole[index].shape, torch.nan)
            merged.copy_to(name, out, index)
            assert torch.equal(out, whole[index]) and torch.equal(merged.read(name, index), whole[index])
        half = torch.empty(whole.shape, dtype=torch.bfloat16)
        merged.copy_to(name, half)
        assert torch.equal(half, whole.bfloat16())


def test_the_base_of_half_precision_is_merged_in_float32(base, model, tmp_path):
    lora = LoraSection(rank=2, target_modules=["q_proj"])
    half = export(HfReader(base), read_config(base), tmp_path / "half")
    adapter = random_adapter(model, lora)
    merged = MergedReader(HfReader(half), Weights(adapter), lora)
    name = "model.layers.0.self_attn.q_proj"
    weight = HfReader(half).read(f"{name}.weight").double()
    a, b = (adapter[f"{name}.lora_{letter}.weight"].double() for letter in "AB")
    assert_close(merged.read(f"{name}.weight"), weight + 16 * b @ a, tolerance=1e-6)
    assert merged.dtype("model.norm.weight") == torch.bfloat16


def test_the_files_of_an_adapter(base, model, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "secret.txt"):
        (tokenizer / name).write_text(name)
    lora = LoraSection(**SECTIONS["plain"])
    adapter = Weights(random_adapter(model, lora))
    out = export_adapter(
        adapter, lora, tmp_path / "out", base_model="google/gemma-2b", tokenizer=tokenizer, card="# Card"
    )
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("chat_template.jinja", "tokenizer.json"),
    ]
    stored = load_file(out / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model."): t.tolist() for name, t in stored.items()} == {
        name: t.tolist() for name, t in adapter.tensors.items()
    }
    # What peft writes of a config it read is what it read.
    read = peft.PeftConfig.from_pretrained(out)
    read.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (out, tmp_path / "theirs"))
    assert set(theirs.pop("target_modules")) == set(ours.pop("target_modules")) == set(LORA_TARGETS)
    assert ours == theirs
    assert (read.base_model_name_or_path, read.task_type, read.inference_mode) == ("google/gemma-2b", "CAUSAL_LM", True)
    half = export_adapter(adapter, lora, tmp_path / "half", base_model="b", dtype="bfloat16")
    assert {t.dtype for t in load_file(half / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.fixture
def url() -> Iterator[str]:
    yield "memory://adapters/run/adapter"
    fsspec.filesystem("memory").rm("/adapters", recursive=True)


def test_an_adapter_at_a_url_is_the_same(base, model, tmp_path, url):
    lora = LoraSection(**SECTIONS["dora"])
    adapter = Weights(random_adapter(model, lora))
    local = export_adapter(adapter, lora, tmp_path / "adapter", base_model=str(base), card="# Card")
    out = export_adapter(adapter, lora, url, base_model=str(base), card="# Card")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in local.iterdir()}
    assert list(fsspec.filesystem("memory").store)[-1].endswith("/adapter_config.json")
    reader = AdapterReader(url)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in adapter.tensors.items())
    with pytest.raises(UserError, match="adapter: it is read from, so it cannot be overwritten"):
        export_adapter(reader, lora, url, base_model=str(base), overwrite=True)


def test_only_an_adapter_is_overwritten_and_only_on_request(base, model, tmp_path):
    lora = LoraSection(**SECTIONS["plain"])
    adapter = Weights(random_adapter(model, lora))
    out = export_adapter(adapter, lora, tmp_path / "adapter", base_model=str(base))
    with pytest.raises(UserError, match="adapter: the folder is not empty"):
        export_adapter(adapter, lora, out, base_model=str(base))
    export_adapter(adapter, lora, out, base_model="elsewhere", overwrite=True)
    assert AdapterReader(out).base_model == "elsewhere"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    copy = shutil.copytree(base, tmp_path / "model")
    with pytest.raises(UserError, match="model: the folder holds something else than an adapter"):
        export_adapter(adapter, lora, copy, base_model=str(base), overwrite=True)
    with pytest.raises(UserError, match="adapter: the folder holds something else than a model"):
        export(HfReader(base), read_config(base), out, overwrite=True)


def test_a_failure_leaves_nothing_behind(base, model, tmp_path):
    class Failing(Weights):
        def copy_to(self, name, out, index=None):
            raise OSError(28, "No space left on device")

    lora = LoraSection(**SECTIONS["plain"])
    with pytest.raises(UserError, match="adapter: No space left on device; make room, or export to another folder"):
        export_adapter(Failing(random_adapter(model, lora)), lora, tmp_path / "adapter", base_model="b")
    assert not list(tmp_path.iterdir())


# What cannot be read.


def edited(**changes) -> dict:
    return {"config": changes}


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
BAD = {
    "adapter_config.json: peft_type is 'LOHA'; supported are 'LORA': merge it": edited(peft_type="LOHA"),
    "task_type is 'SEQ_CLS'; supported are 'CAUSAL_LM', None: merge it": edited(task_type="SEQ_CLS"),
    "bias is 'all'; supported are 'none': merge it with peft": edited(bias="all"),
    "modules_to_save is ['lm_head'], which is not supported; merge it": edited(modules_to_save=["lm_head"]),
    "rank_pattern is {'q_proj': 8}, which is not supported; merge it": edited(rank_pattern={"q_proj": 8}),
    "layers_to_transform is [0], which is not supported; merge it": edited(layers_to_transform=[0]),
    "a_new_idea is 3, which is not supported; merge it": edited(a_new_idea=3),
    "init_lora_weights is 'pissa'; supported are True, ": edited(init_lora_weights="pissa"),
    "target_modules is 'all-linear'; supported are lists of q_proj, ": edited(target_modules="all-linear"),
    "target_modules is ['lm_head']; supported are lists of q_proj, ": edited(target_modules=["lm_head"]),
    "r is 0; take the file from the adapter's origin": edited(r=0),
    "lora_alpha is 'much'; take the file from the adapter's origin": edited(lora_alpha="much"),
    "r is missing; take the file from the adapter's origin": {"drop": "r"},
    f"'{Q0.removeprefix('base_model.')}.lora_A.weight' does not begin with 'base_model.model.'; save it": {
        "rename": lambda name: name.removeprefix("base_model.")
    },
    "model.embed_tokens.lora_embedding_A does not belong to an adapter of q_proj, v_proj; merge it": {
        "tensors": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 101)}
    },
    "q_proj.lora_B.weight is missing; write or download": {"without": f"{Q0}.lora_B.weight"},
    "q_proj.lora_A.weight has shape [3, 48], but its config says that its rank is 4; take both": {
        "tensors": {f"{Q0}.lora_A.weight": torch.zeros(3, 48)}
    },
    "q_proj.lora_A.weight is stored as torch.int8; save it as float32": {
        "tensors": {f"{Q0}.lora_A.weight": torch.zeros(4, 48, dtype=torch.int8)}
    },
    "the adapter holds no tensors; write or download": {"rename": lambda name: None},
}


@pytest.fixture
def small(base, model, tmp_path) -> Path:
    lora = LoraSection(rank=4, target_modules=["q_proj", "v_proj"])
    return export_adapter(Weights(random_adapter(model, lora)), lora, tmp_path / "adapter", base_model=str(base))


@pytest.mark.parametrize("message", BAD)
def test_what_is_not_supported_is_explained(small, message):
    change = BAD[message]
    config = json.loads((small / "adapter_config.json").read_text()) | change.get("config", {})
    config.pop(change.get("drop"), None)
    (small / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(small / "adapter_model.safetensors") | change.get("tensors", {})
    tensors.pop(change.get("without"), None)
    renamed = {change.get("rename", str)(name): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in renamed.items() if name}, small / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        AdapterReader(small)
    assert message in str(error.value)
    assert str(small) in str(error.value) or "holds no tensors" in message


def test_missing_files_are_explained(small, tmp_path):
    (small / "adapter_model.safetensors").rename(small / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.safetensors is not there; download it again, or convert"):
        AdapterReader(small)
    with pytest.raises(UserError, match="adapter_config.json: No such file"):
        AdapterReader(tmp_path)


def wider(tensors: dict) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = torch.zeros(4, 50)


def another_layer(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.replace(".1.", ".7.")] = tensors[name]


def fewer_layers(tensors: dict) -> None:
    for name in list(tensors):
        if ".1." in name:
            del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            wider,
            "memory, model.layers.0.self_attn.q_proj.lora_A.weight: the adapter is for another base model: "
            "model.layers.0.self_attn.q_proj.lora_A.weight has shape [4, 50], but in {base}/model.safetensors "
            "model.layers.0.self_attn.q_proj.weight has [64, 48]; give the base model",
        ),
        (another_layer, "than {base}/model.safetensors: that has nothing for model.layers.7.self_attn.q_proj.weight"),
        (fewer_layers, "than {base}/model.safetensors: it has nothing for model.layers.1.self_attn.q_proj.weight"),
    ],
    ids=["shape", "more layers", "fewer layers"],
)
def test_another_base_is_refused(base, model, change, message):
    lora = LoraSection(rank=4, target_modules=["q_proj", "v_proj"])
    tensors = random_adapter(model, lora)
    change(tensors)
    with pytest.raises(UserError) as error:
        MergedReader(HfReader(base), Weights(tensors), lora)
    assert message.format(base=base) in str(error.value)
