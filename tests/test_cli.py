"""Commands as they are typed: what they print, and that a mistake costs one line and leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_xla.chips import CHIPS
from gemma_xla.cli import main, recipe
from gemma_xla.errors import UserError
from gemma_xla.flops import FlopCounter, report
from gemma_xla.model.config import preset
from recipes.pretrain import main as pretrain
from tests.adapters import make_lora_run
from tests.conftest import VOCAB_SIZE
from tests.hf.hub import TOKEN, Hub, serving

ROOT = Path(__file__).parents[1]
PROMPT = "he was in the"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Commands set this for their own process; take it back afterwards."""
    monkeypatch.setenv("USE_TORCH_XLA", "0")


def refused(capsys, command, *arguments: str) -> str:
    """The line with which a command ends at a mistake."""
    with pytest.raises(SystemExit) as stop:
        command([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def run_recipe(arguments: list[str]) -> None:
    recipe("Pretrain Gemma.", pretrain, arguments)


def overridden(path: Path, *overrides: str) -> list[str]:
    return ["--config", str(path), *(part for override in overrides for part in ("--set", override))]


def in_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


# Mistakes in a run's config.

# Overrides -> what the line says.
MISTAKES = {
    "model.preset=gemma-9b": "model.preset: no preset 'gemma-9b' (did you mean 'gemma-7b'?); there are gemma-2b, ",
    "model.overrides.hidden=64": "model: unknown field 'hidden'",
    "model.overrides.head_dim=15": "model: head_dim is 15; rotary embeddings need an even number",
    "model.overrides.vocab_size=many": "model: vocab_size is 'many'; it must be of type int",
    "model.overrides.vocab_size=480": f"data.tokenizer: it has {VOCAB_SIZE} tokens but the model's vocab_size is 480",
    "model.overrides.eos_token_id=7": "data.tokenizer: its eos_token_id is 1 but the model's is 7",
    "data.seq_len=128": "data.seq_len is 128 but the model's max_position_embeddings is 64",
    "data.train=missing.jsonl": "data.train[0].path: there is no file or folder 'missing.jsonl'; check the path",
    "data.train={folder}/*.txt": "data.train[0].path: '{folder}/*.txt' matches no file",
    "data.train={folder}/empty.jsonl": "data.train[0].path: there are no documents in ",
    "data.eval={folder}/empty.jsonl": "data.eval[0].path: there are no documents in ",
    "data.train={path: {corpus}/train.jsonl, column: txt}": (
        "data.train[0].column: {corpus}/train.jsonl:1 has no column 'txt' (did you mean 'text'?); it has id, text"
    ),
    "data.train={path: {corpus}/train.jsonl, column: id}": "data.train[0].column: column 'id' of ",
    "data.tokenizer=no/such/tokenizer": "data.tokenizer: 'no/such/tokenizer' is neither a folder with a tokenizer nor",
    "data.tokenizer=": "data.tokenizer is missing; name a tokenizer, or set data.vocab_size to have one trained",
    "data.tokenizer= data.vocab_size=501": f"data.vocab_size is 501 but the model's vocab_size is {VOCAB_SIZE}",
    "data.tokenizer= data.vocab_size=480": "data.vocab_size is 480; 473 tokens are fixed and this text's characters",
    "data.tokenizer= data.vocab_size=900 model.overrides.vocab_size=900": (
        "data.vocab_size is 900, more than the training text supports; set it to at most "
    ),
    "train.grad_accum=3": "train.batch_size is 4; it must be a multiple of grad_accum (3) times the devices that",
    "hardware.chip=v5x": "hardware.chip: none is called 'v5x' (did you mean 'v5p'?)",
    "log.trackers=[abacus]": "log.trackers is ['abacus']: ",
    "mesh.fsdp=2": "mesh: data=1 x fsdp=2 x tensor=1 does not fit 1 device(s)",
    "train.layers=scan": "train.layers is 'scan', which needs PyTorch/XLA; set it to 'loop' to run without",
    "train.stepz=3": "config {folder}/run.yaml: unknown key 'train.stepz'; did you mean 'train.steps'?",
    "train.steps": "--set 'train.steps': write it as key=value, such as train.steps=10",
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(tiny_file, tmp_path, corpus, capsys, overrides):
    def filled(text: str) -> str:
        return text.replace("{folder}", str(tmp_path)).replace("{corpus}", str(corpus))

    (tmp_path / "empty.jsonl").touch()
    path = tiny_file(tmp_path / "run")
    given = overrides.split(" ") if "{" not in overrides else [overrides]
    line = refused(capsys, run_recipe, *overridden(path, *map(filled, given)))
    assert line.startswith(filled(MISTAKES[overrides]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "run.yaml"]


# The same on four devices.
MESH_MISTAKES = {
    "mesh.fsdp=3": "mesh: data=1 x fsdp=3 x tensor=1 does not fit 4 device(s)",
    "mesh.data=-1": "mesh: data and fsdp are both -1; only one axis can take the devices that remain",
    "train.batch_size=6": "train.batch_size is 6; it must be a multiple of grad_accum (1) times the devices that share",
    "mesh.tensor=4 model.overrides.num_attention_heads=6": "mesh.tensor is 4, which does not divide the model's 6 ",
    "model.overrides.intermediate_size=98": "mesh: ('tensor', 'fsdp') splits dimension 0 of 'model.layers.0.mlp.",
}
# torch_xla takes seconds to load: one process tries them all.
TRY_ALL = """
import contextlib, io, json, sys
from gemma_xla.cli import recipe
from recipes.pretrain import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = recipe("Pretrain.", main, arguments)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def on_four_devices(tiny_file, tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, error output and output folder of a run with each of the mesh's mistakes."""
    folders = {mistake: tmp_path_factory.mktemp("mesh") / "run" for mistake in MESH_MISTAKES}
    arguments = [overridden(tiny_file(f), "mesh.virtual_devices=4", *m.split(" ")) for m, f in folders.items()]
    done = in_process("-c", TRY_ALL, json.dumps(arguments), USE_TORCH_XLA="1")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return {mistake: (*result, folder) for (mistake, folder), result in zip(folders.items(), said, strict=True)}


@pytest.mark.parametrize("mistake", MESH_MISTAKES)
def test_a_mesh_that_does_not_fit_is_one_line_and_nothing_is_written(on_four_devices, mistake):
    code, said, folder = on_four_devices[mistake]
    (line,) = [line for line in said.splitlines() if "error" in line.lower()]  # torch_xla has warnings of its own
    assert line.startswith(f"error: {MESH_MISTAKES[mistake]}")
    assert code == 2
    assert not folder.exists()


def test_a_recipe_as_a_process(tiny_file, tmp_path):
    path = tiny_file(tmp_path / "run")
    done = in_process("recipes/pretrain.py", *overridden(path, "train.steps=0"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: config {path}: train.steps is 0; must be greater than 0\n"
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_a_config_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit) as stop:
        run_recipe([])
    assert stop.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_debug_raises_what_is_otherwise_one_line(tiny_file, tmp_path):
    with pytest.raises(UserError, match="it holds no complete checkpoint"):
        main(["export", str(tmp_path), str(tmp_path / "out"), "--debug"])
    with pytest.raises(UserError, match="train.steps is 0; must be greater than 0"):
        run_recipe([*overridden(tiny_file(tmp_path / "run"), "train.steps=0"), "--debug"])


def test_an_interruption_is_no_traceback(tiny_file, tmp_path, capsys):
    def interrupt(_config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        recipe("Pretrain.", interrupt, overridden(tiny_file(tmp_path / "run")))
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


# flops and chips.


def test_flops_for_programs(capsys):
    main(["flops", "gemma-7b", "--seq-len", "8192", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == report(FlopCounter(preset("gemma-7b"), 8192))
    assert printed["parameters"]["model"] == 8_537_680_896  # as published
    main(["flops", "gemma-7b", "--lora-rank", "8", "--json"])
    adapted = json.loads(capsys.readouterr().out)
    # Query, key, value and output of 4096, and a feed-forward of 24576, in 28 layers of width 3072.
    assert adapted["parameters"]["adapters"] == 28 * 8 * (4 * (3072 + 4096) + 3 * (3072 + 24576))
    assert adapted["seq_len"] == 8192
    training = [figures["per_sequence"]["causal"]["training"] for figures in (printed, adapted)]
    assert 0.66 < training[1] / training[0] < 0.72


def test_flops_for_people(capsys):
    main(["flops", "gemma-2b"])
    lines = capsys.readouterr().out.splitlines()
    (total,) = [line.split() for line in lines if line.startswith("total, causal")]
    assert float(total[3]) == pytest.approx(138.04, rel=1e-3)
    assert total[4] == "100.0%"
    assert "parameters, model: 2,506,172,416" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flops", "gemma-9b"], "model.preset: no preset 'gemma-9b' (did you mean 'gemma-7b'?)"),
        (["flops", "gemma-2b", "--seq-len", "9000"], "seq_len is 9000; it must be from 1 to max_position_embeddings"),
        (["flops", "gemma-2b", "--lora-rank", "0"], "lora_rank is 0; it must be greater than 0"),
        (["export", "{folder}", "{folder}/out"], "{folder}: it holds no complete checkpoint below checkpoints/"),
        (["export", "{run}", "{folder}/out", "--dtype", "int8"], "dtype is 'int8'; it must be one of float32, "),
        (["export", "{run}", "{run}"], "{run}: the folder is not empty; give another one, or ask for it to be"),
        (["export", "{run}", "{folder}/out", "--merge"], "{run}: --merge is for runs with LoRA, and this one trained"),
        (["export", "{run}", "{folder}/out", "--checkpoint", "7"], "{run}/checkpoints: step-00000007 is not there"),
        (["export", "{run}", "{folder}/out", "--checkpoint", "beast"], "--checkpoint is 'beast'; write last, best or"),
        (
            ["export", "{run}", "{folder}/out", "--push-to-hub", "me/x"],
            "me/x: nothing can be uploaded to it: ",
        ),
        (["generate", "{folder}", "--prompt", "a"], "{folder}/config.json: No such file or directory"),
        (["generate", "no/such/model", "--prompt", "a"], "no/such/model: no such folder"),
        (["generate", "{run}", "--prompt", "a", "--temperature", "-1"], "temperature is -1.0; it must be 0"),
        (["generate", "{run}", "--prompt", "a", "--max-new-tokens", "99"], "prompt: 2 tokens and max_new_tokens (99) "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_a_command_is_one_line(finished_run, tmp_path, capsys, arguments, message):
    def filled(text: str) -> str:
        return text.replace("{folder}", str(tmp_path)).replace("{run}", str(finished_run))

    assert refused(capsys, main, *map(filled, arguments)).startswith(filled(message))
    assert list(tmp_path.iterdir()) == []


def test_chips(capsys):
    main(["chips"])
    text = capsys.readouterr().out
    assert "v5e: 197 TFLOP/s bf16, $1.20 per hour" in text
    for chip in CHIPS.values():
        assert f"{chip.name}: " in text and chip.price.source in text


# export and generate.


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory) -> Path:
    """What `gemma-xla export` makes of the finished run."""
    out = tmp_path_factory.mktemp("exported") / "model"
    main(["export", str(finished_run), str(out), "--dtype", "float32"])
    return out


@pytest.fixture(scope="module")
def continuation(exported) -> str:
    """The prompt and its likeliest continuation, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_export_prints_the_folder_and_equals_that_of_the_run(finished_run, exported, tmp_path, capsys):
    ours, theirs = (
        {p.name: p.read_bytes() for p in folder.iterdir()} for folder in (exported, finished_run / "export")
    )
    assert ours == theirs
    main(["export", str(finished_run), str(tmp_path / "new"), "--max-shard-size", "50KB"])
    assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 1
    main(["export", str(finished_run), str(tmp_path / "new"), "--overwrite"])
    assert not list((tmp_path / "new").glob("model-*.safetensors"))


@pytest.mark.parametrize("source", ["run", "export"])
def test_generate_continues_as_transformers_does(finished_run, exported, continuation, capsys, source):
    folder = finished_run if source == "run" else exported
    main(["generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "24"])
    assert capsys.readouterr().out == continuation + "\n"
    assert len(continuation) > len(PROMPT) + 10


@pytest.fixture
def lora_run(finished_run, tiny_config, tokenizer_folder, tmp_path) -> Path:
    config = tiny_config(tmp_path / "run", f"model={{init_from: {finished_run}/export}}", "lora={rank: 4, alpha: 16}")
    return make_lora_run(config, tokenizer_folder, {10: 1.0, 20: 2.0})


def test_a_run_with_lora_is_exported_merged_and_continued(lora_run, finished_run, tmp_path, capsys):
    def printed(*arguments: str) -> str:
        main([*arguments])
        return capsys.readouterr().out

    def continuation(folder: Path) -> str:
        return printed("generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "24")

    adapter, merged, again = (str(tmp_path / name) for name in ("adapter", "merged", "again"))
    assert printed("export", str(lora_run), adapter) == f"{adapter}\n"
    assert printed("export", str(lora_run), merged, "--merge", "--dtype", "float32") == f"{merged}\n"
    assert printed("export", adapter, again, "--merge", "--dtype", "float32") == f"{again}\n"
    base = AutoModelForCausalLM.from_pretrained(finished_run / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    plain = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    adapted = PeftModel.from_pretrained(base, adapter)
    tokens = adapted.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert tokens.tolist() != plain.tolist()
    text = tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"
    assert [continuation(folder) for folder in (lora_run, adapter, merged, again)] == [text] * 4
    main(["export", str(lora_run), str(tmp_path / "best"), "--checkpoint", "best"])
    main(["export", str(lora_run), str(tmp_path / "first"), "--checkpoint", "10"])
    first, best, last = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "best", "adapter")
    )
    assert first == best != last


def test_an_adapter_is_no_run(lora_run, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    main(["export", str(lora_run), str(adapter)])
    capsys.readouterr()
    out = str(tmp_path / "out")
    line = refused(capsys, main, "export", adapter, out)
    assert line == f"{adapter}: it is an adapter already; give --merge for the model that has it merged in"
    line = refused(capsys, main, "export", adapter, out, "--merge", "--checkpoint", "best")
    assert line == f"--checkpoint is 'best', but {adapter} is an adapter and no run; leave it out"
    line = refused(capsys, main, "export", lora_run, adapter, "--merge", "--overwrite")
    assert line == f"{adapter}: the folder holds something else than a model, so it is not overwritten; give another"


def test_an_export_is_uploaded(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        main(["export", str(finished_run), str(tmp_path / "out"), "--push-to-hub", "me/tiny"])
        assert capsys.readouterr().out == f"{tmp_path / 'out'}\n{hub.url}/me/tiny\n"
        assert dict(hub.files("me/tiny")) == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert b'from_pretrained("me/tiny")' in hub.repositories["me/tiny"]["README.md"]
        line = refused(capsys, main, "export", finished_run, tmp_path / "new", "--push-to-hub", "them/tiny")
    assert line.startswith("them/tiny: nothing can be uploaded to it: you are logged in as me")
    assert not (tmp_path / "new").exists()


def test_generate_draws_by_its_seed(finished_run, capsys):
    drawn = []
    for seed in (1, 1, 2):
        options = ["--temperature", "5", "--seed", str(seed), "--max-new-tokens", "20"]
        main(["generate", str(finished_run), "--prompt", PROMPT, *options])
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]
    main(["generate", str(finished_run), "--prompt", PROMPT, *options, "--top-k", "1"])
    greedy = capsys.readouterr().out
    main(["generate", str(finished_run), "--prompt", PROMPT, "--max-new-tokens", "20"])
    assert capsys.readouterr().out == greedy != drawn[2]


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="gemma-xla")
    assert script.load() is main
