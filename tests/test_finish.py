"""The end of a run: the folders it leaves for other programs hold the right checkpoint and load there."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from upath import UPath

from gemma_xla import hf
from gemma_xla.checkpoint import CheckpointReader
from gemma_xla.config_file import load_config
from gemma_xla.data.documents import Corpus
from gemma_xla.data.tokenizer import load_tokenizer
from gemma_xla.errors import UserError
from gemma_xla.infer.text import open_model
from gemma_xla.storage import copy_tree, remove_tree
from gemma_xla.train.export import best_step, export_run
from gemma_xla.train.verify import load_with_peft, verify
from gemma_xla.weights import open_weights
from recipes.finetune import main
from tests.adapters import make_lora_run
from tests.conftest import make_texts, write_jsonl
from tests.hf.hub import TOKEN, Hub, serving
from tests.reference import assert_close, random_ids

LORA = "lora={rank: 4, dropout: 0.1, use_dora: true}"
EXPORT = "export={merged: true, verify: true, dtype: float32, push_to_hub: us/tiny}"


@pytest.fixture(scope="module")
def hub():
    with pytest.MonkeyPatch.context() as patch, serving(Hub()) as hub:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def lora_run(finished_run, tiny_config, tmp_path_factory, hub) -> tuple[Path, str]:
    """The folder of a run with LoRA that did everything it can at its end, and what it printed."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    overrides = ["train.steps=15", "checkpoint={every: 5, keep_best: true, keep_last: 1}", "eval.every=5"]
    # What it learns is not what it is evaluated on: the first checkpoint is the best.
    path = write_jsonl(folder.with_name("other.jsonl"), make_texts(40, seed=1))
    overrides += [f"model={{init_from: {finished_run}}}", f"data.train={path}", "log.sample_prompt=he was"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(tiny_config(folder, *overrides, LORA, EXPORT))
    return folder, said.getvalue()


def best_of(folder: Path) -> int:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return min((r for r in records if "eval_loss" in r), key=lambda r: r["eval_loss"])["step"]


def test_a_run_with_lora_leaves_its_best_adapter_and_the_merged_model(lora_run, finished_run):
    folder, _ = lora_run
    kept = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    best = best_of(folder)
    assert (best, kept) == (5, ["step-00000005", "step-00000015"])
    checkpoint = CheckpointReader(folder / "checkpoints" / kept[0], "model/")
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * 7 * 3
    for name in checkpoint.names():
        assert torch.equal(stored[f"base_model.model.{name}"], checkpoint.read(name)), name
    ids = random_ids(hf.read_config(folder / "export"), 2, 9)
    with torch.no_grad():
        adapted = load_with_peft(finished_run / "export", folder / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)(ids).logits
    assert_close(merged, adapted)


def test_a_run_with_lora_says_what_it_made(lora_run, hub):
    folder, said = lora_run
    best = best_of(folder)
    assert f"\nExporting step {best}, which has the lowest held-out loss: " in said
    compared = rf"log-probabilities of (\d+) held-out tokens, {re.escape(str(folder))}/adapter with peft and ours: "
    tokens, difference = re.search(compared + r"they differ by at most (\S+)\n", said).groups()
    assert int(tokens) > 60 and 0 < float(difference) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    tokens = model.generate(**tokenizer("he was", return_tensors="pt"), max_new_tokens=64, do_sample=False)
    assert f"\n{tokenizer.decode(tokens[0], skip_special_tokens=True)}\n" in said
    for name, path in {"adapter": "adapter", "model": "export", "checkpoints": "checkpoints"}.items():
        assert re.search(rf"^ *{name}: {re.escape(str(folder / path))}$", said, re.MULTILINE)
    assert said.endswith(f"    uploaded: {hub.url}/us/tiny\n")
    assert dict(hub.files("us/tiny")) == {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}


def test_the_card_of_an_adapter(lora_run, finished_run):
    folder, _ = lora_run
    text = (folder / "adapter" / "README.md").read_text()
    base = str(finished_run / "export")
    assert "library_name: peft" in text and "pipeline_tag: text-generation" in text
    assert "base_model:" not in text.split("---")[1]  # a folder is none to the hub
    for line in (
        "# tiny",
        f"A LoRA adapter for `{base}`, trained with PyTorch by gemma_xla.",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "us/tiny")',
        "| rank | 4 |",
        "| use_dora | True |",
        f"| steps | {best_of(folder)} |",
    ):
        assert line in text.splitlines(), line


def test_started_again_it_only_exports_again(lora_run, hub, tmp_path, capsys):
    folder, said = lora_run
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*.*")}
    stored = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    main(load_config(folder / "config.yaml"))
    assert {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*.*")} == before
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == stored
    assert capsys.readouterr().out.endswith(said[said.index("\n     adapter: ") :])


# Which checkpoint.


@pytest.fixture
def made_run(finished_run, tiny_config, tokenizer_folder, tmp_path) -> Path:
    config = tiny_config(tmp_path / "run", f"model={{init_from: {finished_run / 'export'}}}", LORA)
    return make_lora_run(config, tokenizer_folder, {10: 3.0, 20: 1.5, 30: 2.0})


@pytest.mark.parametrize(("which", "step"), [("last", 30), ("best", 20), ("10", 10)])
def test_the_checkpoint_asked_for_is_exported(made_run, tmp_path, which, step):
    out = export_run(made_run, tmp_path / "adapter", checkpoint=which)
    reader = hf.AdapterReader(out)
    expected = CheckpointReader(made_run / "checkpoints" / f"step-{step:08d}", "model/")
    assert all(torch.equal(reader.read(name), expected.read(name)) for name in expected.names())
    merged = export_run(made_run, tmp_path / "model", checkpoint=which, merge=True, dtype="float32")
    again = export_run(out, tmp_path / "again", merge=True, dtype="float32")
    assert load_file(merged / "model.safetensors").keys() == load_file(again / "model.safetensors").keys()
    for name, tensor in load_file(merged / "model.safetensors").items():
        assert torch.equal(tensor, load_file(again / "model.safetensors")[name])


def test_a_run_at_a_url_is_exported_and_continued_as_a_local_one(made_run, tmp_path):
    url = UPath("memory://runs/lora")
    copy_tree(made_run, url)
    try:
        for merge in (False, True):
            here = export_run(made_run, tmp_path / f"out-{merge}", checkpoint="best", merge=merge)
            there = export_run(url, url / f"out-{merge}", checkpoint="best", merge=merge)
            same = {path.name for path in here.iterdir()} - {"README.md"}
            assert {path.name for path in there.iterdir()} == same | {"README.md"}
            assert all((here / name).read_bytes() == (there / name).read_bytes() for name in same)
        models = [open_model(place) for place in (made_run, url, url / "out-False")]
        ids = torch.tensor([models[0][1]("he was in")["input_ids"]])
        one, two, three = (model.cpu()(ids) for model, *_ in models)
        assert torch.equal(one, two) and not torch.equal(one, three)  # the newest, and the best
    finally:
        remove_tree(UPath("memory://runs"))


def test_the_best_is_one_that_is_kept_and_whole(made_run):
    assert best_step(made_run) == (20, 1.5)
    with (made_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "eval_loss": 0.5}\n')
    assert best_step(made_run) == (20, 1.5)
    (made_run / "checkpoints" / "step-00000020" / "state.json").unlink()
    assert best_step(made_run) == (30, 2.0)
    (made_run / "metrics.jsonl").write_text('{"step": 30, "loss": 0.5}\n')
    with pytest.raises(UserError, match="none of its checkpoints was evaluated, so none is the best; take the last"):
        best_step(made_run)


def test_a_full_run_exports_its_best(finished_run, tmp_path):
    folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "eval_loss": 0.0}\n')
    out = export_run(folder, tmp_path / "model", checkpoint="best", dtype="float32")
    expected = CheckpointReader(folder / "checkpoints" / "step-00000040", "model/")
    assert {name: t.tolist() for name, t in load_file(out / "model.safetensors").items()} == {
        name: expected.read(name).tolist() for name in expected.names()
    }


# Comparing with peft.


@pytest.fixture
def held_out(tiny_config, tmp_path, tokenizer_folder):
    config = tiny_config(tmp_path / "none")
    return SimpleNamespace(corpus=Corpus(config.data, seed=0), tokenizer=load_tokenizer(tokenizer_folder))


def test_an_adapter_that_is_another_is_told(made_run, finished_run, tmp_path, held_out):
    ours, base = open_weights(made_run), finished_run / "export"
    out = export_run(made_run, tmp_path / "adapter")
    assert re.search(r"^log-probabilities of \d+ held-out .* at most \d\.\de-0\d$", verify(held_out, ours, base, out))
    path = out / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name] * 1.1}, path)
    warning = r"^warning: export.verify: log-probabilities of .* they differ by up to \d\.\de[-+]\d+, more than 1e-03; "
    assert re.search(warning, verify(held_out, ours, base, out))
    save_file(tensors | {name: tensors[name] * torch.nan}, path)
    assert "they differ by up to nan, more than" in verify(held_out, ours, base, out)
    held_out.corpus = SimpleNamespace(has_eval=False)
    assert verify(held_out, ours, base, out).startswith("warning: export.verify: there is no held-out text to compare")
