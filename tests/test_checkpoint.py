"""Checkpoints: whole and in parts, readable with safetensors alone, and complete or not there."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from upath import UPath

from gemma_xla import storage
from gemma_xla.backend import Backend
from gemma_xla.checkpoint import (
    CheckpointError,
    CheckpointReader,
    Saver,
    complete,
    newest,
    open_run,
    read_state,
    set_aside,
    tidy,
)
from gemma_xla.checkpoint import folder as folder_module
from gemma_xla.checkpoint import saver as saver_module
from gemma_xla.errors import TrainingError, UserError
from gemma_xla.model.config import preset

# What each host holds of "matrix", [6, 4], and "vector", [5]: rows and columns from and to.
QUARTERS = {
    0: {"matrix": [((0, 3), (0, 2)), ((0, 3), (2, 4))], "vector": [((0, 5),)], "count": [()]},
    1: {"matrix": [((3, 6), (0, 1)), ((3, 6), (1, 4))], "vector": [], "count": []},
}


class Host(Backend):
    """One of two hosts, each of which holds some pieces of each tensor."""

    process_count = 2

    def __init__(self, index: int, tensors: dict[str, torch.Tensor], barrier: threading.Barrier) -> None:
        super().__init__(torch.device("cpu"))
        self.process_index = index
        self.barrier = lambda: barrier.wait(20)
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def pieces(self, tensor):
        places = QUARTERS[self.process_index][self._names[id(tensor)]]
        return [(index, tensor[index].clone()) for index in (tuple(slice(*p) for p in place) for place in places)]


def saver(root: Path, backend: Backend, **options) -> Saver:
    return Saver(root, backend, **{"keep_last": 9, **options})


def save(root: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, backend: Backend, **options) -> Path:
    """Save one checkpoint and wait for it."""
    one = saver(root, backend, **options)
    one.save(step, tensors, state)
    one.close()
    return root / f"step-{step:08d}"


def save_on_two_hosts(root: Path, step: int, tensors: dict[str, torch.Tensor], state: dict) -> Path:
    barrier = threading.Barrier(2)
    hosts = [Host(index, tensors, barrier) for index in range(2)]
    threads = [threading.Thread(target=save, args=(root, step, tensors, state, host)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return root / f"step-{step:08d}"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "vector": torch.randn(5, generator=generator).bfloat16(),
        "matrix": torch.randn(6, 4, generator=generator),
        "count": torch.tensor(7.0),
    }


@pytest.fixture
def backend() -> Backend:
    return Backend(torch.device("cpu"))


@pytest.fixture(params=["one part", "two hosts", "a bucket"])
def folder(request, tmp_path, tensors, backend) -> Path:
    """A checkpoint of ``tensors``."""
    state = {"data": {"lanes": [1, 2]}}
    if request.param == "two hosts":
        return save_on_two_hosts(tmp_path, 12, tensors, state)
    root = UPath(f"memory://{tmp_path}") if request.param == "a bucket" else tmp_path
    return save(root, 12, tensors, state, backend)


def test_what_is_saved_is_read(folder, tensors):
    assert folder.name == "step-00000012"
    reader = CheckpointReader(folder)
    assert set(reader.names()) == tensors.keys()
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
        assert reader.read(name).dtype == tensor.dtype
    state = read_state(folder)
    assert (state["step"], state["data"]) == (12, {"lanes": [1, 2]})
    assert complete(folder.parent) == [folder]
    found = newest(folder.parent, pytest.fail)
    assert found == (folder, state, [])


def test_any_part_is_read_whatever_the_parts_it_was_written_in(folder, tensors):
    reader = CheckpointReader(folder)
    spans = [slice(start, stop) for start in range(6) for stop in range(start, 7)]
    for rows in spans:
        for columns in spans[:15]:
            index = (rows, columns)
            assert torch.equal(reader.read("matrix", index), tensors["matrix"][index]), index
    for index in [(slice(None),), (slice(2, None),), (slice(None, -1), slice(-3, None)), (slice(4, 2),)]:
        assert torch.equal(reader.read("matrix", index), tensors["matrix"][index]), index
    assert torch.equal(reader.read("vector", (slice(1, 3),)), tensors["vector"][1:3])
    assert torch.equal(reader.read("count", ()), tensors["count"])


def test_a_prefix_selects_and_is_taken_off(tmp_path, backend):
    save(tmp_path, 1, {"model/a": torch.ones(2), "optimizer/a/exp_avg": torch.zeros(3)}, {}, backend)
    reader = CheckpointReader(tmp_path / "step-00000001", "model/")
    assert reader.names() == ["a"]
    assert torch.equal(reader.read("a"), torch.ones(2))


def test_it_holds_safetensors_and_json_alone(folder, tensors, tmp_path):
    hosts = {file.stem.rpartition("-")[2] for file in folder.iterdir() if file.name != "state.json"}
    names = {f"tensors-{host}.{kind}" for host in hosts for kind in ("safetensors", "json")}
    assert {file.name for file in folder.iterdir()} == names | {"state.json"}
    local = tmp_path / "local"
    storage.copy_tree(folder, local)
    found = [item for file in local.glob("*.safetensors") for item in load_file(file).items()]
    assert {key.partition("#")[0] for key, _ in found} == tensors.keys()
    assert sum(values.numel() for _, values in found) == 6 * 4 + 5 + 1
    index = json.loads((folder / "tensors-00000.json").read_text())
    part = index["matrix"]["parts"][0]
    rows, columns = (slice(*bounds) for bounds in zip(part["start"], part["stop"], strict=True))
    with safe_open(local / "tensors-00000.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor(part["key"]), tensors["matrix"][rows, columns])


# Damage.


def test_a_lost_host_is_noticed(tmp_path, tensors):
    folder = save_on_two_hosts(tmp_path, 1, tensors, {})
    with pytest.raises(CheckpointError, match="tensors-00001.json cannot be read"):
        (folder / "tensors-00001.json").rename(folder / "elsewhere")
        folder_module.check(folder)
    reader = CheckpointReader(folder)
    assert torch.equal(reader.read("vector"), tensors["vector"])  # host 0 holds it all
    assert torch.equal(reader.read("matrix", (slice(0, 3), slice(0, 4))), tensors["matrix"][:3])
    for index in (None, (slice(2, 4), slice(0, 4))):
        with pytest.raises(UserError, match=r"step-00000001: 'matrix' is incomplete; was a host's file lost\?"):
            reader.read("matrix", index)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def foreign(file: Path) -> None:
    file.write_text('{"step": 3}')


def lie(file: Path) -> None:
    file.write_text(file.read_text().replace("2.9.0", "2.9.1"))


DAMAGE = {
    ("tensors-00000.safetensors", Path.unlink): "tensors-00000.safetensors cannot be read (No such file or directory)",
    ("tensors-00000.safetensors", cut): "tensors-00000.safetensors is 50 bytes long, not ",
    ("tensors-00000.safetensors", flip): "tensors-00000.safetensors is damaged: its checksum is not that of what",
    ("tensors-00000.json", Path.unlink): "tensors-00000.json cannot be read (No such file or directory)",
    ("tensors-00000.json", cut): "tensors-00000.json is 50 bytes long, not ",
    ("tensors-00000.json", flip): "tensors-00000.json is damaged",
    ("state.json", cut): "state.json cannot be used: ",
    ("state.json", lie): "state.json is damaged: its checksum is not that of what was written",
    ("state.json", foreign): "state.json cannot be used: it was not written by gemma_xla",
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, tensors, backend, name, damage):
    older = save(tmp_path, 1, tensors, {"versions": {"torch": "2.9.0"}}, backend)
    newer = save(tmp_path, 2, tensors, {"versions": {"torch": "2.9.0"}}, backend)
    damage(newer / name)
    said = []
    found = newest(tmp_path, said.append)
    assert (found.folder, found.damaged) == (older, [newer])
    (line,) = said
    assert line.startswith(f"warning: checkpoint {newer}: {DAMAGE[name, damage]}")
    assert line.endswith("; trying the one before it")
    damage(older / name)
    with pytest.raises(UserError, match=r"none of its 2 checkpoint\(s\) is whole; restore one from a copy, or choose"):
        newest(tmp_path, said.append)


def test_without_its_seal_it_is_no_checkpoint(tmp_path, tensors, backend):
    older, newer = (save(tmp_path, step, tensors, {}, backend) for step in (1, 2))
    (newer / "state.json").unlink()
    assert newest(tmp_path, pytest.fail).folder == older
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [older.name]


def test_a_newer_format_is_refused_by_name(tmp_path, tensors, backend):
    state = save(tmp_path, 1, tensors, {}, backend) / "state.json"
    state.write_text(state.read_text().replace("gemma_xla checkpoint 1", "gemma_xla checkpoint 2"))
    with pytest.raises(UserError, match="its format is 'gemma_xla checkpoint 2' and this gemma_xla reads 'gemma_xla"):
        newest(tmp_path, pytest.fail)


def test_a_seal_cannot_point_elsewhere(tmp_path, tensors, backend):
    state = save(tmp_path, 1, tensors, {}, backend) / "state.json"
    text = json.loads(state.read_text().replace("tensors-00000.json", "../../secret"))
    state.write_text(folder_module.seal(text))
    with pytest.raises(CheckpointError, match="names '../../secret', which is not in the folder"):
        folder_module.check(state.parent)


def test_a_damaged_one_is_set_aside_not_deleted(tmp_path, tensors, backend):
    for _ in range(2):
        folder = save(tmp_path, 1, tensors, {}, backend)
        set_aside(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-step-00000001", "damaged-step-00000001-1"]
    assert len(list((tmp_path / "damaged-step-00000001-1").iterdir())) == 3


def test_a_folder_that_is_no_run_is_explained(tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint below checkpoints/; give the folder of a run"):
        open_run(tmp_path)


def test_a_run_is_opened_at_its_newest_checkpoint(tmp_path, backend):
    config = preset("gemma-test").replace(rope_theta=500.0)
    for step in (100, 20):
        tensors = {"model/a": torch.full((2,), float(step)), "optimizer/a/exp_avg": torch.zeros(2)}
        save(tmp_path / "checkpoints", step, tensors, {"model": dataclasses.asdict(config)}, backend)
    reader, found, state = open_run(tmp_path)
    assert (found, state["step"], reader.names()) == (config, 100, ["a"])
    assert reader.read("a").tolist() == [100.0, 100.0]


# Failures while saving.


@pytest.mark.parametrize("victim", ["write_tensors", "replace_text", "sync"])
@pytest.mark.parametrize("existing", [1, 2])
def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path, tensors, backend, monkeypatch, victim, existing):
    for step in range(1, existing + 1):
        save(tmp_path, step, tensors, {}, backend)
    works, said = getattr(saver_module, victim), []

    def fails(*args, **kwargs):
        works(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver_module, victim, fails)
    one = saver(tmp_path, backend, say=said.append)
    one.save(3, {name: tensor + 1 for name, tensor in tensors.items()}, {})
    assert one.wait().errno == errno.ENOSPC
    assert said == [
        "warning: the checkpoint of step 3 could not be written (No space left on device); training goes on, and the "
        "older checkpoints are whole"
    ]
    with pytest.raises(TrainingError, match="the checkpoint of step 3, the latest, could not be written"):
        one.close()
    assert [folder.name for folder in tmp_path.iterdir()] == [folder.name for folder in complete(tmp_path)]
    assert len(complete(tmp_path)) == existing
    assert torch.equal(CheckpointReader(newest(tmp_path, pytest.fail).folder).read("matrix"), tensors["matrix"])
    monkeypatch.undo()
    one.save(4, tensors, {})
    one.close()
    assert complete(tmp_path)[-1].name == "step-00000004"


def test_what_may_pass_is_tried_again(tmp_path, tensors, backend, monkeypatch):
    works, said, calls = saver_module.write_tensors, [], []

    def flaky(*args):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        works(*args)

    monkeypatch.setattr(saver_module, "write_tensors", flaky)
    monkeypatch.setattr(storage, "DELAYS", (0.01, 0.02, 0.04))
    folder = save(tmp_path, 3, tensors, {}, backend, say=said.append)
    assert len(calls) == 3
    assert said == [f"checkpoint {folder} failed (Input/output error); trying again in {s} s" for s in (0.01, 0.02)]
    assert torch.equal(CheckpointReader(folder).read("matrix"), tensors["matrix"])


def test_another_host_that_fails_makes_the_checkpoint_fail(tmp_path, tensors, monkeypatch):
    barrier, said = threading.Barrier(2), ([], [])
    savers = [saver(tmp_path, Host(i, tensors, barrier), say=said[i].append) for i in range(2)]
    plain = saver_module.write_parts

    def fails_on_the_second(stem, held, say):
        if stem.name.endswith("1"):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(stem, held, say)

    monkeypatch.setattr(saver_module, "write_parts", fails_on_the_second)
    threads = [threading.Thread(target=one.save, args=(1, tensors, {})) for one in savers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "No space left" in str(savers[1].wait())
    assert str(savers[0].wait()) == "host 1 did not write its part"
    assert complete(tmp_path) == []


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, tensors, backend, monkeypatch):
    """What is saved is what was there when `save` was called."""
    go, plain = threading.Event(), saver_module.write_parts
    monkeypatch.setattr(saver_module, "write_parts", lambda *args: go.wait(20) and plain(*args))
    one, before = saver(tmp_path, backend), tensors["matrix"].clone()
    one.save(1, tensors, {})
    tensors["matrix"].add_(1)
    assert complete(tmp_path) == []
    go.set()
    one.close()
    assert torch.equal(CheckpointReader(complete(tmp_path)[0]).read("matrix"), before)


# Keeping.


def steps(root: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in complete(root)]


def test_the_newest_are_kept_and_some_for_good(tmp_path, backend):
    one = saver(tmp_path, backend, keep_last=2, keep_every=30)
    kept = []
    for step in range(10, 110, 10):
        one.save(step, {"a": torch.tensor([float(step)])}, {})
        one.close()
        kept.append(steps(tmp_path))
    assert kept[:4] == [[10], [10, 20], [20, 30], [30, 40]]
    assert kept[-1] == [30, 60, 90, 100]
    assert CheckpointReader(complete(tmp_path)[-1]).read("a").item() == 100


def test_a_checkpoint_is_replaced_by_a_later_attempt(tmp_path, tensors, backend):
    save_on_two_hosts(tmp_path, 2, tensors, {})
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    folder = save(tmp_path, 2, other, {}, backend)
    assert torch.equal(CheckpointReader(folder).read("matrix"), other["matrix"])
    assert len(list(folder.iterdir())) == 3


def test_only_whole_names_are_checkpoints(tmp_path, tensors, backend):
    whole = save(tmp_path, 7, tensors, {}, backend)
    for name in (".step-00000009.tmp", "step-00000009.tmp", "step-9", "damaged-step-00000009", "best"):
        shutil.copytree(whole, tmp_path / name)
    assert complete(tmp_path) == [whole]
    save(tmp_path, 8, tensors, {}, backend, keep_last=1)
    assert len(list(tmp_path.iterdir())) == 6
    assert complete(tmp_path / "missing") == []
