"""Checkpoints: whole and in parts, readable with safetensors alone, and complete or not there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gemma_xla import checkpoint
from gemma_xla.backend import Backend
from gemma_xla.checkpoint import CheckpointReader, complete, open_run, prune, read_state, save
from gemma_xla.errors import UserError
from gemma_xla.model.config import preset

# What each host holds of "matrix", [6, 4], and "vector", [5]: rows and columns from and to.
QUARTERS = {
    0: {"matrix": [((0, 3), (0, 2)), ((0, 3), (2, 4))], "vector": [((0, 5),)], "count": [()]},
    1: {"matrix": [((3, 6), (0, 1)), ((3, 6), (1, 4))], "vector": [], "count": []},
}


class Hosts(Backend):
    """One of two hosts, each of which holds some pieces of each tensor."""

    process_count = 2

    def __init__(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(torch.device("cpu"))
        self.process_index = index
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def pieces(self, tensor):
        places = QUARTERS[self.process_index][self._names[id(tensor)]]
        return [(index, tensor[index].clone()) for index in (tuple(slice(*p) for p in place) for place in places)]


class WaitsForTheOther(Hosts):
    """Host 0, which at its second barrier lets host 1 write its files."""

    def __init__(self, tensors: dict[str, torch.Tensor], root: Path, step: int) -> None:
        super().__init__(0, tensors)
        self.barriers = 0
        self.other = lambda: save(root, step, tensors, {"host": 1}, Hosts(1, tensors))

    def barrier(self):
        self.barriers += 1
        if self.barriers == 2:
            self.other()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(6, 4, generator=generator),
        "vector": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor(7.0),
    }


@pytest.fixture
def backend() -> Backend:
    return Backend(torch.device("cpu"))


@pytest.fixture(params=["one part", "two hosts"])
def folder(request, tmp_path, tensors, backend) -> Path:
    """A checkpoint of ``tensors``."""
    if request.param == "two hosts":
        backend = WaitsForTheOther(tensors, tmp_path, 12)
    return save(tmp_path, 12, tensors, {"step": 12, "data": {"lanes": [1, 2]}}, backend)


def test_what_is_saved_is_read(folder, tensors):
    assert folder.name == "step-00000012"
    reader = CheckpointReader(folder)
    assert set(reader.names()) == tensors.keys()
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
        assert reader.read(name).dtype == tensor.dtype
    assert read_state(folder) == {"step": 12, "data": {"lanes": [1, 2]}}


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


def test_it_holds_safetensors_and_json_alone(folder, tensors):
    hosts = {file.stem.rpartition("-")[2] for file in folder.glob("tensors-*")}
    names = {f"tensors-{host}.{kind}" for host in hosts for kind in ("safetensors", "json")}
    assert {file.name for file in folder.iterdir()} == names | {"state.json"}
    found = [item for file in folder.glob("*.safetensors") for item in load_file(file).items()]
    assert {key.partition("#")[0] for key, _ in found} == tensors.keys()
    assert sum(values.numel() for _, values in found) == 6 * 4 + 5 + 1
    index = json.loads((folder / "tensors-00000.json").read_text())
    part = index["matrix"]["parts"][0]
    rows, columns = (slice(*bounds) for bounds in zip(part["start"], part["stop"], strict=True))
    with safe_open(folder / "tensors-00000.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor(part["key"]), tensors["matrix"][rows, columns])


# Damage.


def test_a_lost_host_is_noticed(tmp_path, tensors):
    folder = save(tmp_path, 1, tensors, {}, WaitsForTheOther(tensors, tmp_path, 1))
    (folder / "tensors-00001.json").unlink()
    reader = CheckpointReader(folder)
    assert torch.equal(reader.read("vector"), tensors["vector"])  # host 0 holds it all
    assert torch.equal(reader.read("matrix", (slice(0, 3), slice(0, 4))), tensors["matrix"][:3])
    for index in (None, (slice(2, 4), slice(0, 4))):
        with pytest.raises(UserError, match=r"step-00000001: 'matrix' is incomplete; was a host's file lost\?"):
            reader.read("matrix", index)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:50])])
@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "tensors-00000.json", "state.json"])
def test_a_damaged_file_is_named(tmp_path, tensors, backend, name, damage):
    folder = save(tmp_path, 1, tensors, {"step": 1, "versions": {"torch": "2.9.0"}, "more": [1, 2, 3]}, backend)
    damage(folder / name)
    with pytest.raises(UserError) as error:
        read_state(folder)
        CheckpointReader(folder).read("matrix")
    assert str(error.value).startswith(f"checkpoint {folder}: ")
    assert name in str(error.value) or "it holds no tensors-*.json" in str(error.value)


def test_a_folder_that_is_no_run_is_explained(tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint below checkpoints/; give the folder of a run"):
        open_run(tmp_path)


def test_a_run_is_opened_at_its_newest_checkpoint(tmp_path, backend):
    config = preset("gemma-test").replace(rope_theta=500.0)
    for step in (100, 20):
        tensors = {"model/a": torch.full((2,), float(step)), "optimizer/a/exp_avg": torch.zeros(2)}
        save(tmp_path / "checkpoints", step, tensors, {"step": step, "model": dataclasses.asdict(config)}, backend)
    reader, found, state = open_run(tmp_path)
    assert (found, state["step"], reader.names()) == (config, 100, ["a"])
    assert reader.read("a").tolist() == [100.0, 100.0]


@pytest.mark.parametrize("victim", ["save_file", "_write_text", "_sync"])
@pytest.mark.parametrize("existing", [1, 2])
def test_a_failure_leaves_the_checkpoints_that_were_there(tmp_path, tensors, backend, monkeypatch, victim, existing):
    for step in range(1, existing + 1):
        save(tmp_path, step, tensors, {"step": step}, backend)
    works = getattr(checkpoint, victim)

    def fails(*args, **kwargs):
        works(*args, **kwargs)
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, victim, fails)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, other, {"step": "wrong"}, backend)
    monkeypatch.undo()
    assert [folder.name for folder in complete(tmp_path)] == ["step-00000001", "step-00000002"][:existing]
    newest = complete(tmp_path)[-1]
    assert read_state(newest) == {"step": existing}
    assert torch.equal(CheckpointReader(newest).read("matrix"), tensors["matrix"])
    # What was left behind is in nobody's way.
    save(tmp_path, 2, other, {"step": 2}, backend)
    assert torch.equal(CheckpointReader(tmp_path / "step-00000002").read("matrix"), other["matrix"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


# Keeping.


def test_the_newest_are_kept(tmp_path, backend):
    for step in (5, 100, 20, 3):
        save(tmp_path, step, {"a": torch.tensor([float(step)])}, {}, backend)
    assert [folder.name[-3:] for folder in complete(tmp_path)] == ["003", "005", "020", "100"]
    prune(tmp_path, 2)
    assert [folder.name[-3:] for folder in complete(tmp_path)] == ["020", "100"]
    prune(tmp_path, 2)
    assert CheckpointReader(complete(tmp_path)[-1]).read("a").item() == 100


def test_only_whole_names_are_checkpoints(tmp_path, tensors, backend):
    whole = save(tmp_path, 7, tensors, {}, backend)
    for name in (".step-00000009.tmp", "step-00000009.tmp", "step-9", "step-000000090", "best"):
        shutil.copytree(whole, tmp_path / name)
    assert complete(tmp_path) == [whole]
    prune(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 6
    assert complete(tmp_path / "missing") == []
