"""The estimate on programs that the TPU compiler makes now: cycles against the chip's peaks, counts against sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_xla.chips import CHIPS
from gemma_xla.plan.estimate import estimate
from gemma_xla.plan.result import Estimate
from gemma_xla.sharding import MeshShape

pytestmark = pytest.mark.aot

SIZE = 8192
SCRIPT = f"""
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

def compile(name, topology, shape, f, *arguments):
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    devices = sorted(devices, key=lambda device: device.id)
    mesh = Mesh(np.array(devices).reshape(shape), ("data", "fsdp"))
    shaped = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, P(*p))) for s, d, p in arguments]
    with jax.set_mesh(mesh):
        text = jax.jit(f).lower(*shaped).compile().as_text()
    with open(f"{{sys.argv[1]}}/{{name}}", "w") as file:
        file.write(text)

whole = ()
for chip, topology in (("v5e", "v5e:2x2"), ("v5p", "v5p:2x2x1"), ("v6e", "v6e:2x2")):
    matrix, eight = ((({SIZE}, {SIZE}), kind, whole) for kind in (jnp.bfloat16, jnp.int8))
    compile(f"matmul-{{chip}}", topology, (1, 4), lambda a, b: a @ b, matrix, matrix)
    dot = lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.int32)
    compile(f"int8-{{chip}}", topology, (1, 4), dot, eight, eight)
    compile(f"memory-{{chip}}", topology, (1, 4), lambda a: a + 1, ((2 * {SIZE}, 2 * {SIZE}), jnp.float32, whole))

def heads(q, k):
    return jnp.einsum("bqhd,bkhd->bhqk", q, k)
compile("heads", "v5e:4x4", (4, 4), heads, *[((32, 512, 8, 64), jnp.bfloat16, (("data", "fsdp"),))] * 2)

def layers(x, w):
    def layer(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, P(None, None))), None
    return jax.lax.scan(layer, x, w)[0]
compile("layers", "v5e:4x4", (4, 4), layers, ((8192, 2048), jnp.bfloat16, (("data", "fsdp"),)),
        ((7, 2048, 2048), jnp.bfloat16, (None, "fsdp")))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    settings = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], env=os.environ | settings, check=True, timeout=300)
    return folder


def estimated(folder: Path, name: str, chip: str, mesh: MeshShape) -> Estimate:
    return estimate((folder / name).read_text(), CHIPS[chip], mesh)


@pytest.mark.parametrize(("chip", "bf16", "int8", "memory"), [
    ("v5e", 0.88, 0.97, 0.81), ("v5p", 0.90, 0.87, 0.72), ("v6e", 0.70, 0.60, 0.81),
])  # fmt: skip
def test_cycles_agree_with_the_clock(compiled, chip, bf16, int8, memory):
    # Shares of the peak: a clock that were wrong would show in all of them.
    for name, share in (("matmul", bf16), ("int8", int8)):
        (matmul,) = estimated(compiled, f"{name}-{chip}", chip, MeshShape(1, 4)).matmuls
        peak = (CHIPS[chip].peak_int8 if name == "int8" else CHIPS[chip].peak_flops).value
        assert matmul.ideal_seconds == pytest.approx(2 * SIZE**3 / peak)
        assert matmul.ideal_seconds / matmul.seconds == pytest.approx(share, abs=0.02)
    found = estimated(compiled, f"memory-{chip}", chip, MeshShape(1, 4))
    ideal = 2 * 4 * (2 * SIZE) ** 2 / CHIPS[chip].hbm_bandwidth.value
    assert ideal / found.seconds == pytest.approx(memory, abs=0.02)


def test_batched_products_are_attention(compiled):
    found = estimated(compiled, "heads", "v5e", MeshShape(4, 4))
    assert found.parts["attention"] > 0
    assert found.parts["matmuls"] == 0
    # Two of 32 sequences on each chip.
    assert sum(m.ideal_seconds for m in found.matmuls) == pytest.approx(2 * 2 * 8 * 512 * 512 * 64 / 197e12)


def test_gathered_layers(compiled):
    found = estimated(compiled, "layers", "v5e", MeshShape(4, 4))
    products = sum(m.ideal_seconds for m in found.matmuls)
    assert products == pytest.approx(7 * 2 * 512 * 2048 * 2048 / 197e12)
    assert all(m.count % 7 == 0 for m in found.matmuls)
    gathered = [one for one in found.collectives if one.kind == "all-gather"]
    assert {one.axis for one in gathered} == {"fsdp"}
    assert sum(one.num_bytes for one in gathered) == 7 * 2 * 2048 * 2048
    assert found.unpriced == []
