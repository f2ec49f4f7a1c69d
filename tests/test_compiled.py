"""torch.compile and attention in blocks, as on a GPU: the numbers of plain PyTorch, and no second compilation."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo

from gemma_xla.backend import Backend
from gemma_xla.config import LoraSection, OptimizerSection, TrainSection
from gemma_xla.model.attention import Mask, attend
from gemma_xla.model.config import preset
from gemma_xla.model.gemma import init_parameter
from gemma_xla.model.lora import init_adapter, is_adapter
from gemma_xla.train.build import build_model
from gemma_xla.train.optimizer import build_optimizer
from gemma_xla.train.step import make_step
from tests.reference import assert_close
from tests.test_attention import SEGMENTS, S, brute_force, qkv, spelled_out
from tests.worker import batch

CONFIG = preset("gemma-test").replace(initializer_range=0.1, num_hidden_layers=3)
# What has kernels for CPUs; it needs a C++ compiler.
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")


@pytest.fixture(autouse=True)
def _compile_anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Compiling(Backend):
    """Traces as on a GPU, and runs what was traced with one of torch's compilers."""

    def __init__(self, compiler: str) -> None:
        super().__init__(torch.device("cpu"))
        self._compiler = compiler

    def compile(self, function):
        return torch.compile(function, dynamic=False, backend=self._compiler) if self.compiles else function


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one-document", "packed"])
def test_attention_in_blocks_equals_a_softmax_over_visible_keys(segments, window):
    attention = torch.compile(attend, backend="aot_eager", dynamic=False)
    inputs, mask = qkv(kv_heads=1, requires_grad=True), Mask(segments)
    mask.prepare("flex", S, window, torch.device("cpu"))
    cotangent = torch.randn(2, S, 4, 8, generator=torch.Generator().manual_seed(1))
    out = attention(*inputs, mask, window=window, impl="flex")
    expected = spelled_out(*inputs, brute_force(segments, window))
    assert_close(out, expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for name, got, want in zip("qkv", torch.autograd.grad((out * cotangent).sum(), inputs), wanted, strict=True):
        assert_close(got, want, f"gradient of {name}")


def test_blocks_leave_out_what_nobody_sees():
    segment_ids = torch.arange(4).repeat_interleave(256)[None]
    blocks = Mask(segment_ids).blocks(1024, None, torch.device("cpu"))
    # Of 8 x 8 blocks of 128 positions each document has three: two on the diagonal, one below.
    assert blocks.sparsity() == pytest.approx(100 * (1 - 12 / 64))


def test_few_queries_need_no_blocks():
    q, k, v = qkv()
    mask = Mask(SEGMENTS, torch.tensor([4]))
    assert torch.equal(attend(q[:, [4]], k, v, mask, impl="flex"), attend(q[:, [4]], k, v, mask, impl="sdpa"))


def steps(compiler: str | None, attention: str, lora: LoraSection | None, dtype=torch.float32, **settings):
    """Loss and gradient norm of three steps, and what each of them compiled."""
    backend = Compiling(compiler or "none")
    section = TrainSection(steps=1, batch_size=8, loss_chunk=16, compile=compiler is not None, **settings)

    def make(name, shape, _spec, dtype):
        values = torch.empty(shape)
        if not is_adapter(name):
            init_parameter(name, values, CONFIG, 0)
        elif name.endswith("vector"):
            values.fill_(1.0)
        else:
            init_adapter(name.replace("lora_B", "lora_A"), values, 0)  # zeros would hide what comes after
        return values.to(dtype)

    model, specs = build_model(CONFIG, backend, make, attention, lora, dtype)
    optimizer = build_optimizer(model, specs, backend, OptimizerSection())
    step = make_step(model, specs, optimizer, backend, section, dtype)
    backend.seed(3)
    results, compiled = [], [backend.compilations()]
    for number in range(3):
        results += step([batch(number, CONFIG)], 1e-2).tolist()[:2]
        compiled.append(backend.compilations())
    return results, [after - before for before, after in zip(compiled, compiled[1:], strict=False)]


DROPOUT = LoraSection(rank=4, dropout=0.3)
CASES = {"blocks": ("flex", None, {"remat": "full"})}
SLOW_CASES = {
    "dropout": ("sdpa", DROPOUT, {"remat": "full"}),
    "kept": ("sdpa", None, {}),
    "dora": ("sdpa", DROPOUT.model_copy(update={"use_dora": True}), {"remat": "full"}),
    "int8": ("sdpa", None, {"precision": "int8", "remat": "full"}),
    "int8-stochastic": ("sdpa", None, {"precision": "int8", "int8_rounding": "stochastic"}),
    "int8-dropout": ("sdpa", DROPOUT, {"precision": "int8", "remat": "full"}),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_a_traced_step_is_that_of_plain_pytorch(case):
    attention, lora, settings = (CASES | SLOW_CASES)[case]
    expected, none = steps(None, "sdpa", lora, **settings)
    found, compiled = steps("aot_eager", attention, lora, **settings)
    assert found == pytest.approx(expected, rel=2e-6)
    assert none == [0, 0, 0]
    # One layer stands for all; another graph for the first, whose input may need no gradient; the loss.
    assert compiled[0] in (2, 3)
    assert compiled[1:] == [0, 0]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("lora", [None, DROPOUT], ids=["all", "lora"])
def test_a_compiled_step_is_that_of_plain_pytorch(lora):
    # Without dropout: compiled code draws other random numbers.
    plain = lora and lora.model_copy(update={"dropout": 0.0})
    expected, _ = steps(None, "sdpa", plain, remat="full")
    found, compiled = steps("inductor", "sdpa", plain, remat="full")
    # Adam's first update of an adapter is little more than its gradient's sign, which may go either way where that is
    # all but 0: what follows is compared up to the next loss.
    numbers = 3 if lora else None
    assert found[:numbers] == pytest.approx(expected[:numbers], rel=1e-5)
    assert compiled[1:] == [0, 0]
    if lora:
        # What is computed again drops out the same.
        kept, again = (steps("inductor", "sdpa", lora, remat=remat)[0] for remat in ("none", "full"))
        assert again == pytest.approx(kept, rel=1e-5)


@pytest.mark.slow
@needs_compiler
def test_compiled_bfloat16_is_as_close_as_plain():
    exact, _ = steps(None, "sdpa", None)
    plain, _ = steps(None, "sdpa", None, torch.bfloat16)
    found, _ = steps("inductor", "sdpa", None, torch.bfloat16)
    assert found == pytest.approx(exact, rel=3e-3)
    assert found != pytest.approx(exact, rel=1e-6)
    assert found == pytest.approx(plain, rel=3e-3)
