"""Several processes of one run: who reads and writes what; what becomes of the others when one ends or stands still."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from gemma_xla.backend import Backend
from gemma_xla.checkpoint import complete, newest, read_state
from gemma_xla.checkpoint import saver as saver_module
from gemma_xla.errors import LostProcessError, UserError
from gemma_xla.train import Trainer, peers
from gemma_xla.train.metrics import read_metrics
from tests import runs
from tests.test_checkpoint import save
from tests.test_distributed import MESHES, ended
from tests.test_resume import arguments, wait_for_steps
from tests.test_trainer import fit, losses

SETTINGS = ["checkpoint.every=2", "eval.every=3", "export.at_end=false", "train.grad_accum=2", MESHES["data"]]
LONG = ["train.steps=100000", "checkpoint.every=3", "export.at_end=false", MESHES["data"]]


# Reading and writing.


def record_batches(batches: list[torch.Tensor], patch) -> None:
    """Note the tokens of each step's rows, ``[rows, T]``."""
    plain = Trainer._next_micro_batches

    def read(self):
        found = plain(self)
        batches.append(torch.cat([batch["input_ids"] for batch in found]))
        return found

    patch(Trainer, "_next_micro_batches", read)


def observed(given: list[str], folder: Path, out: Path) -> None:
    """A run that notes what this process reads and which paths below ``folder`` it changes, by what the system is
    asked for.
    """
    batches, changed, rank = [], set(), os.environ["RANK"]
    record_batches(batches, setattr)

    def audit(event: str, args: tuple) -> None:
        writes = event == "open" and (args[1] or "r")[0] in "wax+" or event == "open" and args[2] & os.O_ACCMODE
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            paths = [os.fspath(arg) for arg in args[:2] if isinstance(arg, str | Path)]
            changed.update(path for path in paths if path.startswith(f"{folder}/"))

    sys.addaudithook(audit)
    runs.pretrain(given, out / "log")
    torch.save(batches, out / f"{rank}.pt")
    (out / f"{rank}.json").write_text(json.dumps(sorted(changed)))


@pytest.fixture(scope="module")
def two(tiny_file, tmp_path_factory) -> Path:
    """What two processes of a run noted; the run is in the folder "run" there."""
    out = tmp_path_factory.mktemp("two")
    given = arguments(tiny_file(out / "run"), *SETTINGS)
    assert ended(runs.start_several(2, observed, given, out / "run", out)) == {0}, (out / "log").read_text()[-3000:]
    return out


def test_processes_read_their_own_rows_which_together_are_the_batch(two, tiny_config, tmp_path, monkeypatch):
    whole: list[torch.Tensor] = []
    record_batches(whole, monkeypatch.setattr)
    fit(tiny_config(tmp_path / "run", *(s for s in SETTINGS if not s.startswith("mesh"))))
    parts = [torch.load(two / f"{rank}.pt") for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 6
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(first) == len(second) == len(batch) // 2 == 2
        assert torch.equal(torch.cat([first, second]), batch)
        assert not torch.equal(first, second)


def test_one_process_writes_what_all_share(two):
    first, second = (json.loads((two / f"{rank}.json").read_text()) for rank in range(2))
    below = [{Path(path).relative_to(two / "run").as_posix() for path in paths} for paths in (first, second)]
    for shared in ("README.md", "environment.json", "config.yaml"):
        assert f".{shared}.tmp" in below[0]
    assert {"metrics.jsonl", ".claim"} <= below[0]
    # The other one: its own part of each checkpoint, and nothing else.
    own = re.compile(r"checkpoints|checkpoints/step-\d{8}|checkpoints/step-\d{8}/\.?tensors-00001\.\w+(\.tmp)?")
    assert len(below[1]) > 6
    assert [path for path in below[1] if not own.fullmatch(path)] == []
    assert not any("tensors-00001" in path for path in below[0] if not path.endswith(".sums"))


# Agreeing on where to go on.


class Talking(Backend):
    """One of two hosts that are threads of this process."""

    process_count = 2
    _barrier = threading.Barrier(2)
    _values: list = [None, None]

    def __init__(self, index: int) -> None:
        super().__init__(torch.device("cpu"))
        self.process_index = index

    def gather_objects(self, value):
        self._values[self.process_index] = value
        self._barrier.wait(20)
        values = list(self._values)
        self._barrier.wait(20)
        return values


def agreed(roots: list[Path]) -> list:
    """What two hosts with these folders find to go on from, or what they are refused with; and what is said."""
    found, said = [None, None], []

    def look(index: int) -> None:
        try:
            found[index] = newest(roots[index], said.append, Talking(index))
        except UserError as error:
            found[index] = error

    threads = [threading.Thread(target=look, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [*found, said]


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Each host's own view of the checkpoints: both see step 1, the second one sees step 2 as well."""
    backend = Backend(torch.device("cpu"))
    for host, steps in enumerate([(1,), (1, 2)]):
        for step in steps:
            save(tmp_path / str(host), step, {"a": torch.tensor([float(step)])}, {}, backend)
    return [tmp_path / "0", tmp_path / "1"]


def test_hosts_go_on_from_what_all_of_them_see(folders):
    for roots in (folders, folders[::-1]):
        first, second, said = agreed(roots)
        assert first.state["step"] == second.state["step"] == 1
        assert [f.name for f in first.damaged] == ["step-00000002"]
        host = roots.index(folders[0])
        assert len(said) == 2
        assert f"state.json cannot be used: No such file or directory (host {host}); trying the one be" in said[0]


def test_hosts_that_share_nothing_are_refused(folders, tmp_path):
    first, second, _ = agreed([folders[1], tmp_path / "empty"])
    assert str(first).endswith(str(second).partition("empty")[2])
    assert "none of its 2 checkpoint(s) is whole; restore one" in str(first)
    assert "choose another output_dir that all hosts share" in str(first)


# One that ends, or stands still.


def dying(given: list[str], log: Path, where: str) -> None:
    """A run whose second process is killed: from outside, or while it saves."""
    if where == "save" and os.environ["RANK"] == "1":
        saver_module.write_parts = lambda *_args: os.kill(os.getpid(), signal.SIGKILL)
    runs.pretrain(given, log)


@pytest.mark.parametrize("where", ["step", "save"])
def test_the_end_of_one_process_is_that_of_the_others(tiny_file, tmp_path, where):
    folder, log = tmp_path / "run", tmp_path / "log"
    file = tiny_file(folder)
    processes = runs.start_several(2, dying, arguments(file, *LONG), log, where)
    if where == "step":
        wait_for_steps(folder, 8, processes[0])
        processes[1].kill()
    assert ended(processes) == {-signal.SIGKILL, LostProcessError.exit_code}
    text = log.read_text()
    assert "error: another process of this run ended or no longer answers; its own output says why" in text
    assert "Traceback" not in text
    found = complete(folder / "checkpoints")
    assert bool(found) == (where == "step")
    # The next start goes on.
    last = read_state(found[-1])["step"] if found else 0
    processes = runs.start_several(2, runs.pretrain, arguments(file, *LONG, f"train.steps={last + 3}"), log)
    assert ended(processes) == {0}
    assert len(losses(folder)) == last + 3


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_others(tiny_file, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    given = arguments(tiny_file(folder), *LONG, "watch={hang_floor: 15, hang_limit: 60}")
    processes = runs.start_several(2, runs.pretrain, given, log)
    wait_for_steps(folder, 20, processes[0])
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(120)
    assert processes[0].exitcode == 4
    processes[1].kill()
    processes[1].join()
    assert "error: hung: " in log.read_text()  # at a step or, where it had just begun, at a save
    stacks = (folder / "hang-0.txt").read_text()
    assert "(watch.hang_" in stacks and "distributed_c10d.py" in stacks
    steps = [r["step"] for r in read_metrics(folder / "metrics.jsonl")]
    last = read_state(complete(folder / "checkpoints")[-1])["step"]
    assert steps[-1] - 6 <= last <= steps[-1]
    given = arguments(tiny_file(folder), *LONG, f"train.steps={last + 3}")
    assert ended(runs.start_several(2, runs.pretrain, given, log)) == {0}


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError(
                "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
            ),
            True,
        ),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("Connection closed by peer"), False),
        (RuntimeError("[enforce fail at gloo/x.cc] shapes differ"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),
        (None, False),
    ],
)
def test_errors_of_lost_processes_are_told_from_others(error, lost):
    assert peers.is_lost(error) == lost
