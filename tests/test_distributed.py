"""Plain PyTorch in several processes: the numbers of one process, and checkpoints that move between them."""

from __future__ import annotations

import functools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gemma_xla.backend import Backend
from gemma_xla.checkpoint import complete, read_state
from gemma_xla.config import LoraSection, MeshSection, OptimizerSection, TrainSection
from gemma_xla.distributed import open_torch, process_mesh
from gemma_xla.errors import UserError
from gemma_xla.model.config import preset
from gemma_xla.model.loss import Layout
from gemma_xla.train.build import adapted, build_model, initial, trained
from gemma_xla.train.metrics import read_metrics
from gemma_xla.train.optimizer import MOMENTS, build_optimizer
from gemma_xla.train.parallelize import parallelize
from gemma_xla.train.step import TrainStep
from tests import runs
from tests.hf.conftest import Weights
from tests.test_moves import go_on
from tests.test_resume import arguments, assert_undisturbed, wait_for_steps
from tests.test_trainer import fit, losses, untimed
from tests.worker import batch

ROOT = Path(__file__).parents[1]
CONFIG = preset("gemma-test").replace(initializer_range=0.1)
ADAPTERS = {"none": None, "dora": LoraSection(rank=4, use_dora=True)}


# Steps.


class Recorder(Weights):
    """Weights in memory that note which parts of them are read."""

    def __init__(self) -> None:
        cpu = Backend(torch.device("cpu"))
        super().__init__(build_model(CONFIG, cpu, initial(CONFIG, cpu, 0), "sdpa")[0].state_dict())
        self.read_parts: dict[str, int] = {}

    def copy_to(self, name, out, index=None):
        self.read_parts[name] = out.numel()
        super().copy_to(name, out, index)


def take_steps(
    mesh: tuple[int, int], lora: LoraSection | None, dtype: torch.dtype, out: Path, parts: int = 1, **settings: str
) -> None:
    """Four steps of two micro-batches each; every process leaves what it found in the folder ``out``.

    Args:
        parts: those of a batch that have scales of their own in 8-bit products.
        settings: of the config's ``train``.
    """
    backend = open_torch(MeshSection(data=mesh[0], fsdp=mesh[1]), None)
    weights = Recorder()
    make = adapted(weights, backend, 0) if lora else initial(CONFIG, backend, 0)
    model, specs = build_model(CONFIG, backend, make, "sdpa", lora, dtype)
    optimizer = build_optimizer(model, specs, backend, OptimizerSection())
    section = TrainSection(steps=1, batch_size=8, remat="full", **settings)
    if parts > 1:
        backend.use_compiler = lambda _wanted: setattr(backend, "loss_layout", Layout(parts))
    parallelize(model, specs, backend, section, dtype)
    step = TrainStep(model, optimizer, backend, clip_norm=1.0, loss_chunk=16)
    results, count, index = [], backend.process_count, backend.process_index
    for number in range(4):
        mine = {key: value.chunk(count)[index].chunk(2) for key, value in batch(number, CONFIG).items()}
        results.append(step([{key: parts[i] for key, parts in mine.items()} for i in range(2)], 1e-2).tolist())
        with torch.no_grad():
            model(batch(0, CONFIG)["input_ids"])  # as an evaluation between two steps
    pieces = {}
    for name, parameter in trained(model):
        tensors = {"model": parameter.detach(), **{moment: optimizer.state[parameter][moment] for moment in MOMENTS}}
        pieces |= {(name, kind): (tensor.shape, backend.pieces(tensor)) for kind, tensor in tensors.items()}
    torch.save({"results": results, "read": weights.read_parts, "pieces": pieces}, out / f"{index}.pt")


def steps_in(mesh: tuple[int, int], lora: LoraSection | None, dtype: torch.dtype, out: Path, **settings) -> list[dict]:
    """What each process found."""
    out.mkdir()
    take = functools.partial(take_steps, mesh, lora, dtype, out, **settings)
    if (count := math.prod(mesh)) == 1:
        take()
    else:
        assert ended(runs.start_several(count, take)) == {0}
    return [torch.load(out / f"{index}.pt", weights_only=False) for index in range(count)]


def ended(processes) -> set[int]:
    """Their exit codes."""
    for process in processes:
        process.join(120)
    return {process.exitcode for process in processes}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, by adapters and precision."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda lora, dtype: steps_in((1, 1), ADAPTERS[lora], dtype, folder / f"{lora}{dtype}")[0])


@pytest.mark.parametrize(
    ("mesh", "lora"),
    [
        ((1, 2), "dora"),
        *(pytest.param(mesh, "none", marks=pytest.mark.slow) for mesh in ((2, 1), (1, 2), (2, 2))),
        *(pytest.param(mesh, "dora", marks=pytest.mark.slow) for mesh in ((2, 1), (2, 2))),
    ],
)
def test_the_numbers_are_those_of_one_process(alone, tmp_path, mesh, lora):
    expected, found = alone(lora, torch.float32), steps_in(mesh, ADAPTERS[lora], torch.float32, tmp_path / "out")
    for process in found:
        assert process["results"] == found[0]["results"]
        for ours, theirs in zip(process["results"], expected["results"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)  # loss, gradient norm, numbers of tokens
        # Each process has read its own part of the frozen weights and no more.
        for name, count in process["read"].items():
            assert count * (1 if "norm" in name else mesh[1]) == expected["read"][name], name
    for key, (shape, [(_, values)]) in expected["pieces"].items():
        parts = [piece for process in found for piece in process["pieces"][key][1]]
        whole = torch.full(shape, torch.nan)
        for index, part in parts:
            whole[index] = part
        assert sum(part.numel() for _, part in parts) == values.numel()  # nothing is saved twice
        assert (whole - values).norm() < 1e-5 * values.norm(), key


@pytest.mark.parametrize("mesh", [(1, 2), pytest.param((2, 1), marks=pytest.mark.slow)])
def test_products_in_8_bits_are_those_of_one_process_that_scales_in_parts(tmp_path, mesh):
    folders = (tmp_path / name for name in ("two", "parts", "whole"))
    int8 = {"precision": "int8"}
    two = steps_in(mesh, None, torch.float32, next(folders), **int8)
    parts, whole = (steps_in((1, 1), None, torch.float32, next(folders), parts=n, **int8)[0] for n in (2, 1))
    assert two[0]["results"] == two[1]["results"]
    found, parts, whole = (torch.tensor(run["results"]) for run in (two[0], parts, whole))
    # Loss and gradient norm of the first step; with scales over all rows, the gradients are others.
    assert found[0].tolist() == pytest.approx(parts[0].tolist(), rel=1e-6)
    assert found[0, 0] == pytest.approx(whole[0, 0].item(), rel=1e-6)
    assert found[0, 1] != pytest.approx(whole[0, 1].item(), rel=1e-5)
    # Later a value half-way between two integers goes either way where sums are made in another order.
    torch.testing.assert_close(found, parts, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["none", "dora"])
def test_the_compute_dtype_is_that_of_one_process(alone, tmp_path, lora):
    expected, found = alone(lora, torch.bfloat16), steps_in((1, 2), ADAPTERS[lora], torch.bfloat16, tmp_path / "out")
    exact = alone(lora, torch.float32)["results"]
    losses, theirs, exact = ([result[0] for result in r] for r in (found[0]["results"], expected["results"], exact))
    assert losses == pytest.approx(theirs, rel=3e-4)
    assert losses != pytest.approx(exact, rel=1e-6)


@pytest.mark.slow
def test_gradients_can_be_added_up_in_the_compute_dtype(tmp_path):
    first = {}
    for dtype in ("float32", "compute"):
        found = steps_in((1, 2), None, torch.bfloat16, tmp_path / dtype, reduce_dtype=dtype)
        first[dtype] = found[0]["results"][0]
    assert first["compute"][0] == first["float32"][0]
    # Each entry is rounded to 8 bits once more.
    assert first["compute"][1] == pytest.approx(first["float32"][1], rel=2**-8)
    assert first["compute"][1] != first["float32"][1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": 3, "fsdp": 1}, "mesh: data=3 x fsdp=1 x tensor=1 does not fit 2 device"),
        ({"tensor": 2}, "mesh.tensor is 2; that axis needs PyTorch/XLA. Set it to 1, and mesh.fsdp to the number"),
        ({"virtual_devices": 4}, "mesh.virtual_devices is 4 but 2 processes were started, with a device each; leave"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        process_mesh(MeshSection(**given), 2)


# Runs.

MESHES = {"data": "mesh={data: 2, fsdp: 1}", "fsdp": "mesh={data: 1, fsdp: 2}"}
SETTINGS = ["checkpoint.every=3", "eval.every=3", "export.at_end=false", "train.grad_accum=2", "train.remat=full"]
LONG = ["train.steps=24", "checkpoint.every=4", "eval.every=5", "export.at_end=false"]


def launch(path: Path, *overrides: str) -> None:
    """Take a run to its end in two processes."""
    log = path.with_suffix(".log")
    processes = runs.start_several(2, runs.pretrain, arguments(path, *overrides), log)
    assert ended(processes) == {0}, log.read_text()[-4000:]


def assert_same_figures(ours: Path, theirs: Path) -> None:
    left, right = untimed(ours), untimed(theirs)
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        assert mine == pytest.approx(other, rel=1e-6)


def back_at(step: int, run: Path, to: Path) -> Path:
    """A copy of a run that was stopped after ``step``."""
    shutil.copytree(run, to)
    for later in complete(to / "checkpoints"):
        if read_state(later)["step"] > step:
            shutil.rmtree(later)
    return to


@pytest.fixture(scope="module")
def one(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    fit(tiny_config(folder, *SETTINGS))
    return folder


@pytest.fixture(scope="module", params=["fsdp", pytest.param("data", marks=pytest.mark.slow)])
def two(request, tiny_file, tmp_path_factory) -> tuple[str, Path]:
    """A mesh and a run on it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    launch(tiny_file(folder), MESHES[request.param], *SETTINGS)
    return request.param, folder


def test_a_run_reports_and_saves_what_one_process_does(one, two):
    _, folder = two
    assert_same_figures(folder, one)
    assert len(complete(folder / "checkpoints")) == 2
    log = folder.with_suffix(".log").read_text()
    assert log.count("step 6: held-out loss") == 1
    assert "Traceback" not in log


def test_one_process_continues_a_run_of_two(one, two, tiny_config, tmp_path):
    folder = back_at(3, two[1], tmp_path / "run")
    fit(tiny_config(folder, *SETTINGS))
    assert_same_figures(folder, one)


def test_two_processes_continue_a_run_of_one(one, two, tiny_file, tmp_path):
    folder = back_at(3, one, tmp_path / "run")
    launch(tiny_file(folder), MESHES[two[0]], *SETTINGS)
    assert "Continuing from step 3" in folder.with_suffix(".log").read_text()
    assert_same_figures(folder, one)


@pytest.mark.slow
def test_a_run_goes_from_one_mesh_to_another(one, two, tiny_file, tmp_path):
    (other,) = MESHES.keys() - {two[0]}
    folder = back_at(3, two[1], tmp_path / "run")
    launch(tiny_file(folder), MESHES[other], *SETTINGS)
    assert_same_figures(folder, one)


@pytest.mark.xla
def test_xla_continues_a_run_of_two_processes(one, two, tiny_file, tmp_path):
    folder = back_at(3, two[1], tmp_path / "run")
    result = go_on(tiny_file(folder), (1, 2, 1), *SETTINGS)
    assert (result["step"], result["devices"], result["different"]) == (3, 2, [])
    assert losses(folder) == pytest.approx(losses(one), rel=1e-5)


# Interruptions.


def dropping(finished_run: Path) -> list[str]:
    """Overrides for a run that draws random numbers."""
    return [*LONG, f"model={{init_from: {finished_run}/export}}", "lora={rank: 4, dropout: 0.2}"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_killed_at_random_ends_with_the_same_bits(finished_run, tiny_file, tmp_path, mesh):
    draw, given = random.Random(3), [MESHES[mesh], *dropping(finished_run)]
    folder, log, kills = tmp_path / "run", tmp_path / "log", 0
    for until in (5, 11, 18):
        processes = runs.start_several(2, runs.pretrain, arguments(tiny_file(folder), *given), log)
        wait_for_steps(folder, until, processes[0])
        time.sleep(draw.random() * 0.05)
        for process in processes:
            kills += process.is_alive()
            process.kill()
        ended(processes)
    assert kills >= 4
    for name in ("run", "undisturbed"):
        launch(tiny_file(tmp_path / name), *given)
    assert_undisturbed(folder, tmp_path / "undisturbed")
    first, second = read_state(complete(folder / "checkpoints")[-1])["rng"]["processes"]
    assert first != second


def test_a_signal_to_one_process_stops_both(finished_run, tiny_file, tmp_path):
    folder, log, given = tmp_path / "run", tmp_path / "log", [MESHES["data"], *dropping(finished_run)]
    processes = runs.start_several(2, runs.pretrain, arguments(tiny_file(folder), *given), log)
    wait_for_steps(folder, 4, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert ended(processes) == {75}
    steps = [record["step"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
    assert read_state(complete(folder / "checkpoints")[-1])["step"] == steps[-1] < 24
    assert log.read_text().count(f"SIGTERM: saved at step {steps[-1]}; start again to continue from there") == 1
    assert "Traceback" not in log.read_text()


# The launcher.


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_accelerate_starts_the_processes(one, tiny_file, tmp_path, mesh):
    done = accelerate(tiny_file(tmp_path / "run"), MESHES[mesh], *SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_figures(tmp_path / "run", one)


@pytest.mark.slow
def test_a_mistake_ends_all_processes(tiny_file, tmp_path):
    done = accelerate(tiny_file(tmp_path / "run"), "mesh.data=3")
    assert done.returncode == 1
    assert "error: mesh: data=3 x fsdp=-1 x tensor=1 does not fit 2 device(s)" in done.stderr
    assert not (tmp_path / "run").exists()


def accelerate(config: Path, *overrides: str) -> subprocess.CompletedProcess:
    # On a CPU too, this is the option that starts several processes.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "recipes/pretrain.py", *arguments(config, *overrides)]
    variables = os.environ | {"USE_TORCH_XLA": "0"}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
