"""What a run keeps and where: one run at a time, on a disk or in a bucket, explained by itself."""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import uuid
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from upath import UPath

from gemma_xla import cli
from gemma_xla.checkpoint import complete
from gemma_xla.config_file import load_config
from gemma_xla.errors import TrainingError, UserError
from gemma_xla.storage import copy_tree
from gemma_xla.train import Run, Trainer
from gemma_xla.train.folder import RunFolder
from gemma_xla.train.metrics import read_metrics
from recipes.pretrain import main
from tests import runs
from tests.test_resume import arguments, wait_for_steps
from tests.test_trainer import assert_same_bits, fit, untimed


def test_the_folder_explains_itself(finished_run):
    text = (finished_run / "README.md").read_text()
    there = {path.name + "/" * path.is_dir() for path in finished_run.iterdir()} - {"README.md"}
    assert {name for name in there if f"`{name}`" not in text} == set()
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (environment["backend"], environment["devices"], environment["hosts"]) == ("torch", 1, 1)
    assert environment["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}


# One run at a time.


def test_two_runs_cannot_share_a_folder(tiny_file, tiny_config, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(arguments(tiny_file(folder), "train.steps=100000"), tmp_path / "log")
    wait_for_steps(folder, 2, process)
    second = runs.start(arguments(tiny_file(folder)), tmp_path / "second")
    second.join()
    assert second.exitcode == 2
    assert (tmp_path / "second").read_text() == (
        f"error: output_dir: another run is writing to {folder}; wait for its end, stop it, or choose another folder\n"
    )
    assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # A killed run leaves nothing in the way.
    fit(tiny_config(folder, "train.steps=1"))
    assert not (folder / ".claim").exists()


def test_what_a_killed_start_left_is_tidied(tiny_config, tmp_path):
    folder = tmp_path / "run"
    fit(tiny_config(folder, "train.steps=2"))
    shutil.copytree(folder / "tokenizer", folder / ".tokenizer-abc" / "tokenizer")
    (folder / "checkpoints" / "step-00000009").mkdir()
    (folder / "checkpoints" / "step-00000009" / "tensors-00000.safetensors").write_text("half")
    fit(tiny_config(folder, "train.steps=3"))
    assert not (folder / ".tokenizer-abc").exists()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}


# Before anything is spent.


@pytest.mark.parametrize("place", ["/proc/run", "{file}/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_to_is_refused(tiny_config, tmp_path, place):
    (tmp_path / "file").touch()
    folder = Path(place.replace("{file}", str(tmp_path / "file")))
    config = tiny_config(tmp_path / "run", f"output_dir={folder}")
    with pytest.raises(UserError, match=r"^output_dir: nothing can be written to .*; choose a folder you may write to"):
        Run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run.yaml"]


def test_a_disk_without_room_is_refused(tiny_config, tmp_path, monkeypatch):
    usage = collections.namedtuple("Usage", "total used free")
    config = tiny_config(tmp_path / "run", "checkpoint.every=1", "checkpoint.keep_last=3", "export.dtype=float32")
    with Run(config) as run:
        parameters = sum(p.numel() for p in Trainer(run).model.parameters())
    shutil.rmtree(tmp_path / "run")
    # Three kept and one being written: float32 and two moments; and the export.
    needed = 4 * 12 * parameters + 4 * parameters
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, needed - 1))
    with pytest.raises(UserError, match="has room for 0.0 GB, but the checkpoints and the export of this run need"):
        Run(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, needed))
    Run(config).close()
    assert not (tmp_path / "run").exists()  # nothing was put into it yet


# A bucket.


@pytest.fixture
def bucket() -> UPath:
    """A folder of a store that knows no renaming and no appending, only whole objects."""
    return UPath(f"memory://bucket-{uuid.uuid4()}/runs/one")


def in_bucket(tiny_tree, bucket, tmp_path, *overrides):
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(bucket)} | tiny_tree))
    return load_config(path, list(overrides))


def test_a_run_in_a_bucket_is_like_one_on_a_disk(tiny_tree, tiny_config, bucket, tmp_path, capsys):
    given = ["checkpoint.every=2", "eval.every=2", "log.trackers=[tensorboard]", "log.sample_prompt=he was"]
    main(in_bucket(tiny_tree, bucket, tmp_path, *given, "train.steps=4"))
    main(in_bucket(tiny_tree, bucket, tmp_path, *given, "train.steps=6"))
    assert f"Continuing from step 4 ({bucket}/checkpoints/step-00000004)" in capsys.readouterr().out
    main(tiny_config(tmp_path / "run", *given))
    copy_tree(bucket, tmp_path / "fetched")
    assert_same_bits(tmp_path / "fetched", tmp_path / "run")
    assert untimed(tmp_path / "fetched") == untimed(tmp_path / "run")
    ours, theirs = (sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("fetched", "run"))
    assert [name for name in ours if name != ".claim"] == theirs
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "export") for name in ("fetched", "run")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    assert len(list((tmp_path / "fetched" / "tensorboard").iterdir())) >= 2


def test_commands_read_and_write_buckets(tiny_tree, bucket, tmp_path, capsys):
    fit(in_bucket(tiny_tree, bucket, tmp_path, "train.steps=2"))
    capsys.readouterr()
    cli.main(["export", str(bucket), str(bucket / "model")])
    assert capsys.readouterr().out.strip().endswith(f"{bucket}/model")
    assert {path.name for path in (bucket / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    cli.main(["generate", str(bucket), "--prompt", "he was", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith("he was")


def test_a_tokenizer_trained_for_a_bucket_is_found_again(tiny_tree, bucket, tmp_path, corpus):
    given = ["data.tokenizer=null", "data.vocab_size=500"]
    fit(in_bucket(tiny_tree, bucket, tmp_path, *given, "train.steps=1"))
    before = (bucket / "tokenizer" / "tokenizer.json").read_text()
    fit(in_bucket(tiny_tree, bucket, tmp_path, *given, "train.steps=2"))
    assert (bucket / "tokenizer" / "tokenizer.json").read_text() == before


def test_the_newest_run_in_a_bucket_is_the_one_that_counts(tiny_tree, bucket, tmp_path):
    with Run(in_bucket(tiny_tree, bucket, tmp_path, "checkpoint.every=3")) as run:
        trainer = Trainer(run)
        RunFolder(str(bucket)).claim()
        with pytest.raises(TrainingError, match="another run has begun to write to memory://.*; this one ends"):
            trainer.fit()
    assert complete(bucket / "checkpoints") == []
    assert [r["step"] for r in read_metrics(bucket / "metrics.jsonl")] == [1, 2, 3]


def test_a_bucket_that_cannot_be_written_to_is_refused(tiny_tree, bucket, tmp_path, monkeypatch):
    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(UPath, "write_text", denied)
    with pytest.raises(UserError, match=r"nothing can be written to memory://.* \(Permission denied\); check the name"):
        Run(in_bucket(tiny_tree, bucket, tmp_path))
