"""The graphs that are planned are the graphs that a run hands to the compiler."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gemma_xla.model.config import preset
from gemma_xla.weights import read_architecture
from tests.plan.recorder import lived, parsed, planned

ALWAYS = ["data.eval=null", "data.eval_fraction=0", "export.at_end=false", "train.batch_size=8"]
FLOAT32, BFLOAT16 = "train.compute_dtype=float32", "train.compute_dtype=bfloat16"
SCAN, REMAT = "train.layers=scan", "train.remat=full"
SHALLOW = "model.overrides.num_hidden_layers=1"


def mesh(data: int, fsdp: int, tensor: int) -> str:
    return f"mesh={{data: {data}, fsdp: {fsdp}, tensor: {tensor}, virtual_devices: {data * fsdp * tensor}}}"


def surplus(number: int, count: int, norms: int) -> Counter[str]:
    """What the run's graph ``number`` of ``count`` has beyond the plan's, all of it small.

    The totals of which `TrainStep` makes its result, which it still holds when it hands the last graph over. And where
    there are several: a norm's gradient comes from autograd as a view of a tensor [1, 1, hidden], which the run keeps
    from graph to graph beside the view. What changes the view, adding to it or scaling it, is carried over by reshapes.
    """
    base, is_last = "f32[1,1,48]{2,1,0}", number == count - 1
    beyond = Counter({"f32[3]{0} result": int(is_last)})
    if count > 1:
        beyond[f"{base} reshape"] = norms * ((number > 0) + is_last)
        beyond[f"{base} result"] = norms * (not is_last)
    return beyond


@pytest.fixture
def check(tiny_file, tiny_config, tmp_path):
    """Compares the graphs of two steps with those planned."""

    def check(*overrides: str, weights: Path | None = None) -> None:
        config = tiny_config(tmp_path / "run", *ALWAYS, *overrides)
        model = read_architecture(str(weights), lora=True) if weights else preset("gemma-test")
        model = model.replace(**config.model.overrides)
        given = [*ALWAYS, "train.steps=2", *overrides]
        with ThreadPoolExecutor() as pool:
            live = pool.submit(lived, tiny_file(tmp_path / "run"), given, tmp_path / "live")
            plans = planned(config, model, tmp_path / "plan")
            # The first graph makes the weights, and the second step has none of its own.
            _, *runs = live.result()
        assert len(runs) == len(plans) == min(config.train.grad_accum, 3)
        for number, (run, plan) in enumerate(zip(runs, plans, strict=True)):
            assert plan.total() > 1000
            assert list(plan - run) == []
            kinds = Counter(text.partition("(")[0] for text in (run - plan).elements())
            assert kinds == surplus(number, len(plans), 2 * model.num_hidden_layers + 1)

    return check


def test_a_plan_is_of_the_graph_that_runs(check):
    check(mesh(1, 2, 1), SHALLOW, FLOAT32)


@pytest.mark.xla
@pytest.mark.parametrize(
    "overrides",
    [
        [mesh(1, 4, 1), BFLOAT16, SCAN, REMAT],
        [mesh(2, 2, 2), BFLOAT16, SCAN],
        [mesh(1, 1, 4), FLOAT32, REMAT],
        # The second and the third of the four graphs are equal.
        [mesh(1, 2, 1), BFLOAT16, "train.grad_accum=4"],
    ],
    ids=str,
)
def test_any_plan_is_of_the_graph_that_runs(check, overrides):
    check(*overrides)


@pytest.mark.xla
@pytest.mark.parametrize(
    ("lora", "overrides"),
    [
        ("{rank: 4, dropout: 0.1, use_dora: true}", [mesh(1, 2, 1), FLOAT32]),
        ("{rank: 4}", [mesh(2, 1, 2), BFLOAT16, SCAN, REMAT]),
    ],
)
def test_a_plan_of_adapters_is_of_the_graph_that_runs(check, finished_run, lora, overrides):
    weights = finished_run / "export"
    check(f"model={{init_from: {weights}}}", f"lora={lora}", *overrides, weights=weights)


@pytest.mark.xla
def test_another_plan_is_of_another_graph(tiny_config, tmp_path):
    ways = [[mesh(1, 2, 1)], [mesh(2, 1, 1)], [mesh(1, 2, 1), REMAT]]
    configs = [tiny_config(tmp_path / "run", *ALWAYS, SHALLOW, FLOAT32, *way) for way in ways]
    model = preset("gemma-test").replace(**configs[0].model.overrides)
    with ThreadPoolExecutor(2) as pool:
        [one], *others = pool.map(planned, configs, [model] * 3, [tmp_path / name for name in "abc"])
    for [other] in others:
        assert any("sharding" in text for text in other - one)
        assert any("sharding" not in text for text in one - other)


MODULE = """HloModule module, buffer_donor={ (0, {}) }, num_partitions=2

add {
  x = f32[] parameter(0)
  y = f32[] parameter(1)
  ROOT sum = f32[] add(x, y)
}

condition {
  state = (s32[], f32[4,4]) parameter(0)
  i = s32[] get-tuple-element(state), index=0
  limit = s32[] constant(7)
  ROOT less = pred[] compare(i, limit), direction=LT
}

body {
  now = (s32[], f32[4,4]) parameter(0)
  j = s32[] get-tuple-element(now), index=0
  values = f32[4,4] get-tuple-element(now), index=1
  one = s32[] constant(1)
  next = s32[] add(j, one)
  product = f32[4,4] dot(values, values), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT both = (s32[], f32[4,4]) tuple(next, product)
}

ENTRY main {
  weight = f32[4,4] parameter(0), sharding={devices=[2,1]0,1}
  other = f32[4,4] parameter(1), sharding={replicated}
  difference = f32[4,4] subtract(weight, other)
  table = s32[12] constant({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11})
  zero = s32[] constant(0)
  start = (s32[], f32[4,4]) tuple(zero, difference)
  end = (s32[], f32[4,4]) while(start), condition=condition, body=body
  last = f32[4,4] get-tuple-element(end), index=1
  split = f32[4,4] custom-call(last), custom_call_target="Sharding", sharding={devices=[1,2]0,1}
  begin = f32[] constant(0)
  total = f32[4] reduce(last, begin), dimensions={1}, to_apply=add
  ROOT results = (f32[4,4], f32[4], s32[12]) tuple(split, total, table)
}
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(0, {})", "(1, {})"),
        ("constant(7)", "constant(8)"),
        ("8, 9, 10, 11", "8, 9, 11, 10"),
        ("sum = f32[] add", "sum = f32[] maximum"),
        ("lhs_contracting_dims={1}", "lhs_contracting_dims={0}"),
        ("dimensions={1}, to_apply", "dimensions={0}, to_apply"),
        ("sharding={devices=[2,1]0,1}", "sharding={devices=[1,2]0,1}"),
        ("sharding={devices=[1,2]0,1}", "sharding={replicated}"),
        ("subtract(weight, other)", "subtract(other, weight)"),
        ("reduce(last, begin)", "reduce(difference, begin)"),
        ("f32[4,4] custom-call", "f32[4,4]{0,1} custom-call"),
    ],
)
def test_an_account_tells_what_differs(old, new):
    assert old in MODULE
    assert parsed(MODULE) == parsed(MODULE)
    assert parsed(MODULE.replace(old, new)) != parsed(MODULE)
