"""Runs whose bucket fails now and then, or from some moment on."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM
from upath import UPath

from gemma_xla import storage
from gemma_xla.checkpoint import complete, newest
from gemma_xla.cli import recipe
from gemma_xla.config_file import load_config
from gemma_xla.errors import TrainingError
from gemma_xla.storage import copy_tree, move, remove_tree, replace_text
from gemma_xla.train import Run, Trainer
from gemma_xla.train.metrics import read_metrics
from recipes.pretrain import main
from tests.flaky import ERRORS, FlakyFileSystem, flaky, written_to
from tests.test_resume import arguments
from tests.test_trainer import assert_same_bits, untimed

GIVEN = ["checkpoint.every=2", "eval={every: 2, prompts: [he was]}", "log.trackers=[tensorboard]"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(storage, "DELAYS", (0.001, 0.001, 0.001, 0.001))


@pytest.fixture
def bucket() -> UPath:
    return UPath(f"flaky://bucket-{uuid.uuid4()}/runs/one")


@pytest.fixture
def file(tiny_tree, bucket, tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(bucket)} | tiny_tree))
    return path


def contents(folder: UPath) -> dict[str, bytes]:
    prefix = folder.path.rstrip("/") + "/"
    return {k.removeprefix(prefix): f.getvalue() for k, f in FlakyFileSystem.store.items() if k.startswith(prefix)}


@pytest.mark.parametrize("failures", [1, 2])
def test_each_operation_is_repeated_until_it_works(tmp_path, bucket, failures, capsys):
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (tmp_path / "tree" / name).write_bytes(name.encode() * 1000)
    with flaky(failures) as fs:
        replace_text(bucket / "text", "whole")
        copy_tree(tmp_path / "tree", bucket / "tree")
        move(bucket / "tree", bucket / "moved")
        copy_tree(bucket / "moved", tmp_path / "back")
        remove_tree(bucket / "moved" / "deep")
        assert {type(error) for error in fs.raised} == {type(make()) for make in ERRORS}
    assert contents(bucket) == {"text": b"whole", "moved/a": b"a" * 1000}
    assert (tmp_path / "back" / "deep" / "b").read_bytes() == b"deep/b" * 1000
    assert f"warning: writing {bucket}/text failed (Input/output error); trying" in capsys.readouterr().err


def test_a_run_on_a_flaky_bucket_is_like_one_on_a_disk(bucket, file, tiny_config, tmp_path, capsys):
    with flaky(failures=1) as fs:
        main(load_config(file, [*GIVEN, "train.steps=4"]))
        fs.calls.clear()
        main(load_config(file, [*GIVEN, "train.steps=6"]))
        written = {path.partition("/runs/one/")[2] for operation, path in fs.calls if operation == "commit"}
        assert len(fs.raised) > 2 * len(written) > 30
    said = capsys.readouterr()
    assert "Continuing from step 4" in said.out
    assert "could not be" not in said.out + said.err and "Traceback" not in said.err
    main(tiny_config(tmp_path / "run", *GIVEN))
    copy_tree(bucket, tmp_path / "fetched")
    assert_same_bits(tmp_path / "fetched", tmp_path / "run")
    assert untimed(tmp_path / "fetched") == untimed(tmp_path / "run")
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (tmp_path / "fetched", tmp_path / "run")]
    theirs, ours = ({n for n in some if not n.startswith(("tensorboard/", ".claim"))} for some in names)
    assert theirs == ours
    for name in ("samples.jsonl", "config.yaml", "README.md"):
        assert name in written
    AutoModelForCausalLM.from_pretrained(tmp_path / "fetched" / "export")


def stops(file: Path, *overrides: str) -> int:
    """The exit code of a run."""
    with pytest.raises(SystemExit) as stop:
        recipe("Pretrain.", main, arguments(file, *GIVEN, *overrides))
    return stop.value.code


def denied_after(monkeypatch, step: int, denies: Callable[[str, str], bool]) -> None:
    """From that step on these operations fail."""
    plain = Trainer._finish_pending

    def finish(self):
        plain(self)
        if self.step == step:
            self.saver.wait()
            FlakyFileSystem.denies = staticmethod(denies)

    monkeypatch.setattr(Trainer, "_finish_pending", finish)


def test_a_bucket_that_is_gone_ends_a_run_with_one_line_and_keeps_what_was_saved(bucket, file, monkeypatch, capsys):
    with flaky():
        denied_after(monkeypatch, 3, written_to("bucket-"))
        assert stops(file) == 3
    said = capsys.readouterr()
    assert "error: " in said.err and "the checkpoint of step 6, the latest, could not be written" in said.err
    assert "Traceback" not in said.err
    assert said.out.count("warning: the checkpoint of step 4 could not be written") == 1
    for what in ("metrics", "samples", "the log"):
        assert said.out.count(f"warning: {what} could not be written") == 1, what
    assert complete(bucket / "checkpoints")[-1].name == "step-00000002"
    # The bucket is back: the run goes on.
    monkeypatch.undo()
    recipe("Pretrain.", main, arguments(file, *GIVEN))
    assert "Continuing from step 2" in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(bucket / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_the_end_of_a_run_says_what_to_do_where_only_the_export_fails(bucket, file, capsys):
    with flaky(denies=written_to("/export/model")):
        assert stops(file) == 2
    err = capsys.readouterr().err
    assert f"error: {bucket}/export: " in err and "nothing was exported" in err and "Traceback" not in err
    assert newest(bucket / "checkpoints", pytest.fail).state["step"] == 6
    assert not (bucket / "export" / "config.json").exists()
    recipe("Pretrain.", main, arguments(file, *GIVEN))
    assert (bucket / "export" / "config.json").exists()


STARTS = {".probe": "nothing can be written to", ".claim": "could not be written", "README.md": "could not be written"}


@pytest.mark.parametrize("part", STARTS)
def test_a_start_that_cannot_write_says_so(bucket, file, part, capsys):
    with flaky(denies=written_to(part)):
        assert stops(file) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: output_dir: ") and STARTS[part] in err and "Traceback" not in err


def test_old_checkpoints_that_cannot_be_removed_are_no_reason_to_lose_the_new(bucket, file, capsys):
    def keeps_step_2(operation: str, path: str) -> bool:
        return operation == "rm" and "step-00000002" in path and len(complete(bucket / "checkpoints")) == 3

    with flaky(denies=keeps_step_2):
        main(load_config(file, [*GIVEN, "checkpoint.keep_last=2", "export.at_end=false"]))
    out = capsys.readouterr().out
    assert "warning: older checkpoints could not be removed (Input/output error); training goes on" in out
    assert newest(bucket / "checkpoints", pytest.fail).state["step"] == 6


def test_a_claim_that_cannot_be_read_is_no_reason_to_end(bucket, file):
    config = load_config(file, [*GIVEN, "export.at_end=false"])
    unreadable = flaky(denies=lambda operation, path: operation == "open rb" and path.endswith(".claim"))
    with Run(config) as run:
        trainer = Trainer(run)
        with unreadable as fs:
            trainer.fit()
            assert len(fs.raised) >= 3
        replace_text(bucket / ".claim", "another")
        with pytest.raises(TrainingError, match="another run has begun"):
            run.folder.check_claim()
