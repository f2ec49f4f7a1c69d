"""Plans by the real TPU compiler, against what can be derived by hand."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gemma_xla.config_file import load_config
from gemma_xla.plan import children, work
from gemma_xla.plan.children import Progress
from gemma_xla.plan.setup import Setup, prepare
from gemma_xla.plan.slices import hardware
from gemma_xla.train.memory import memory

pytestmark = pytest.mark.aot

# Sizes that fill the chip's tiles, so that padding adds little.
MODEL = """{
  preset: gemma-small, overrides: {hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 3, vocab_size: 4096}
}"""
LAYERS, MATRICES, SEQ_LEN, ROWS = 3, 7, 1024, 2
# Of one head's one block: forward, again for the backward pass, and that pass' own kernel. v5p has two cores.
ATTENTION_SECONDS = {
    "v5e-4": (9094 + 9094 + 21780) / 1.5e9,
    "v5p-8": (9211 + 9211 + 22250) / 2 / 1.75e9,
}
# What a copy reaches of the memory's bandwidth, as a kernel that moves heads does.
COPY_BANDWIDTH = {"v5e-4": 0.81 * 819e9, "v5p-8": 0.72 * 2765e9}


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "run.yaml"
    path.write_text(f"""
output_dir: runs/none
model: {MODEL}
data: {{train: [{{path: none.txt}}], seq_len: {SEQ_LEN}}}
train: {{steps: 10, batch_size_per_device: {ROWS}, remat: full, layers: scan}}
""")
    return path


def setup(path: Path, topology: str, *overrides: str) -> Setup:
    config = load_config(path, list(overrides))
    return prepare(config, hardware(config, topology))


@functools.cache
def compiled(path: Path, topology: str, *overrides: str) -> list[tuple[dict, dict, str]]:
    """Each graph's description, the compiler's account of memory, and the program."""

    def run(module, arguments, stage):
        children.run(module, arguments, stage, Progress(sys.stderr), 300)

    with tempfile.TemporaryDirectory() as folder:
        return list(work._compiled(setup(path, topology, *overrides), Path(folder), run))


@pytest.mark.parametrize(("topology", "chips"), [("v5e-1", 1), ("v5e-4", 4), ("v5p-8", 4)])
def test_memory_and_donation(config_file, topology, chips):
    question = setup(config_file, topology)
    ((description, answer, program),) = compiled(config_file, topology)
    found, held = answer["memory"], memory(question.model, question.hardware.slice_mesh)
    state = held.total - held.trained  # the gradient is no argument
    batch = ROWS * SEQ_LEN * (3 * 4 + 8)
    assert found["argument"] == pytest.approx(state + batch, rel=0.03)
    # Parameters, both moments and the step counts take the place of those before; the loss and its like are new.
    assert found["alias"] == pytest.approx(state, rel=0.03)
    assert 0 <= found["output"] - found["alias"] <= 4096
    plan, _ = work._by_compiler(question, [(description, answer, program)])
    assert plan.memory.fits
    assert plan.memory.parameters + plan.memory.optimizer == state
    assert plan.num_chips == chips


@pytest.mark.parametrize("topology", ["v5e-4", "v5p-8"])
def test_trips_and_collectives(config_file, topology):
    question = setup(config_file, topology)
    plan, _ = work._by_compiler(question, compiled(config_file, topology))
    gathers = sum(c.count for c in plan.estimate.collectives if c.kind == "all-gather")
    # Each layer's matrices forward, and again backward, where they are recomputed.
    assert gathers >= 2 * LAYERS * MATRICES
    flops = sum(m.ideal_seconds for m in plan.estimate.matmuls) * question.hardware.chip.peak_flops.value
    assert flops == pytest.approx(_executed(question), rel=0.02)
    assert plan.figures.step_seconds >= sum(m.ideal_seconds for m in plan.estimate.matmuls)
    assert plan.estimate.unpriced == []
    blocks = LAYERS * ROWS * question.model.num_attention_heads
    moving = _moved_bytes(question) / COPY_BANDWIDTH[topology]
    assert plan.estimate.parts["attention"] == pytest.approx(blocks * ATTENTION_SECONDS[topology] + moving, rel=1e-6)


def test_products_in_8_bits(config_file):
    """All of the layers' products are, and their weights travel in 8 bits."""
    question = setup(config_file, "v5e-4")
    chip, plans = question.hardware.chip, {}
    for precision in ("default", "int8"):
        overrides = ["train.precision=int8"] if precision == "int8" else []
        plans[precision], _ = work._by_compiler(
            setup(config_file, "v5e-4", *overrides), compiled(config_file, "v5e-4", *overrides)
        )
    ideal = {name: sum(m.ideal_seconds for m in plan.estimate.matmuls) for name, plan in plans.items()}
    layers, rest = _products(question)
    assert ideal["default"] == pytest.approx((layers + rest) / chip.peak_flops.value, rel=0.02)
    expected = layers / chip.peak_int8.value + rest / chip.peak_flops.value
    assert ideal["int8"] == pytest.approx(expected, rel=0.02)
    gathered = {
        name: sum(c.num_bytes for c in plan.estimate.collectives if c.kind == "all-gather")
        for name, plan in plans.items()
    }
    # Forward and backward in 2 bytes; forward, again but for down_proj, and turned but where a chip's part is narrower
    # than its tiles, keys and values, in 1.
    model, forward = question.model, _forward(question)
    down = model.hidden_size * model.intermediate_size
    keys_and_values = 2 * model.hidden_size * model.num_key_value_heads * model.head_dim
    # The embedding for the lookup, and for the output layer.
    outer = 2 * 2 * model.vocab_size * model.hidden_size
    assert gathered["default"] == pytest.approx(4 * LAYERS * forward + outer, rel=0.05)
    expected = LAYERS * (4 * forward - (3 * forward - down - keys_and_values))
    assert gathered["default"] - gathered["int8"] == pytest.approx(expected, rel=0.05)


def test_gradients_added_up_in_float32(config_file):
    """The layers' matrices' take two bytes more on their way, and what is gathered no more than before."""
    sums, gathered = {}, {}
    for dtype in ("compute", "float32"):
        overrides = [f"train.reduce_dtype={dtype}"]
        plan, _ = work._by_compiler(setup(config_file, "v5e-4", *overrides), compiled(config_file, "v5e-4", *overrides))
        by_kind = [(c.kind == "all-gather", c.num_bytes) for c in plan.estimate.collectives]
        gathered[dtype] = sum(count for gathers, count in by_kind if gathers)
        sums[dtype] = sum(count for gathers, count in by_kind if not gathers)
    weights = LAYERS * _forward(setup(config_file, "v5e-4"))
    assert sums["float32"] - sums["compute"] == pytest.approx(2 * weights, rel=0.02)
    assert gathered["float32"] == pytest.approx(gathered["compute"], rel=0.02)


def _moved_bytes(question: Setup) -> int:
    """Queries, keys and values read and written where heads are moved to the front, in bfloat16, and read with them a
    float32 table of cosines and one of sines for half a head: forward, again for the backward pass, and back."""
    model = question.model
    queries, keys = model.num_attention_heads, model.num_key_value_heads
    values = keys if keys > 1 else 0
    heads, tables = 2 * 2 * (queries + keys + values), 2 * 2 * 4 / 2
    return LAYERS * 3 * ROWS * SEQ_LEN * model.head_dim * (heads + tables)


def _executed(question: Setup) -> float:
    """FLOPs of a chip's products, those of the attention kernel apart."""
    return sum(_products(question))


def _forward(question: Setup) -> int:
    """Weights of a layer."""
    model = question.model
    width = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    return model.hidden_size * (2 * width + 2 * keys + 3 * model.intermediate_size)


def _products(question: Setup) -> tuple[float, float]:
    """FLOPs of the layers' products with weights, and of the others.

    By hand: forward, again for the backward pass but for the last product, and twice that.
    """
    model, tokens = question.model, ROWS * SEQ_LEN
    forward, down = _forward(question), model.hidden_size * model.intermediate_size
    head = 3 * model.hidden_size * model.vocab_size
    return 2 * tokens * LAYERS * (4 * forward - down), 2 * tokens * head


def test_more_rows_and_micro_batches_cost_what_they_should(config_file):
    plans = {}
    for accum, counts in ((1, [1]), (4, [1, 2, 1])):
        overrides = [f"train.grad_accum={accum}"] if accum > 1 else []
        question, graphs = setup(config_file, "v5e-4", *overrides), compiled(config_file, "v5e-4", *overrides)
        assert [description["count"] for description, *_ in graphs] == counts
        plans[accum], _ = work._by_compiler(question, graphs)
    # A micro-batch more costs less than a step, which has the optimizer too.
    seconds = {accum: plan.figures.step_seconds for accum, plan in plans.items()}
    more = (seconds[4] - seconds[1]) / 3
    assert 0.5 * seconds[1] < more < seconds[1]
    assert plans[4].memory.gradients == plans[1].memory.parameters


def test_slices_add_the_traffic_between_them(config_file):
    one = setup(config_file, "v5e-4")
    two = setup(config_file, "2xv5e-4", "mesh.data=2")
    plans = [work._by_compiler(question, compiled(config_file, "v5e-4"))[0] for question in (one, two)]
    extra = plans[1].figures.step_seconds - plans[0].figures.step_seconds
    (dcn,) = (c for c in plans[1].estimate.collectives if c.axis == "dcn")
    assert extra == pytest.approx(dcn.seconds)
    assert plans[1].tokens_per_step == 2 * plans[0].tokens_per_step


def test_what_does_not_fit_is_an_answer(config_file):
    overrides = ["train.batch_size_per_device=2048"]
    question = setup(config_file, "v5e-1", *overrides)
    plan, programs = work._by_compiler(question, compiled(config_file, "v5e-1", *overrides))
    assert not plan.memory.fits
    assert plan.estimate is None
    assert plan.memory.largest
    assert plan.advice
    assert programs == []


def test_the_command_as_it_is_typed(config_file, tmp_path):
    command = [Path(sys.executable).with_name("gemma-xla"), "plan", config_file, "--topology", "v5e-4"]
    command += ["--cache", tmp_path / "cache", "--plot", tmp_path / "plan.png", "--hlo", tmp_path / "hlo"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fits: ")
    assert "trace" in done.stderr
    assert "compile" in done.stderr
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert "HloModule" in (tmp_path / "hlo" / "0.hlo.txt").read_text()
    command += ["--timeout", "0.5", "--set", "train.remat=none"]
    late = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert late.returncode == 3
    assert late.stderr.splitlines()[-1].startswith("error: to trace took longer than 0.5 s and was ended")
