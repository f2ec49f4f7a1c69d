"""Child process: have the TPU compiler compile a recorded graph for a slice that is not there.

`python -m gemma_xla.plan.compile GRAPH TOPOLOGY OUT`: the graph's files without their suffix, Google's name for the
slice, and where to write. It loads no PyTorch, which would double its memory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gemma_xla.chips import Topology, topology
from gemma_xla.interrupts import end_with_parent
from gemma_xla.tpu_flags import libtpu_arguments

# What the compiler's error begins with when a program does not fit the memory of a chip.
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def compile_graph(hlo: bytes, description: dict[str, Any], slice_: Topology) -> dict[str, Any]:
    """Compile one graph.

    Args:
        hlo: a serialized HloModuleProto, not yet split over devices.
        description: ``arguments``, ``results`` and ``aliases`` of `gemma_xla.xla.placeholders.Graph`.
        slice_: where it is to run.

    Returns:
        ``hlo``, the compiled and scheduled program as text, and ``memory``: bytes by kind. Where it does not fit:
        ``out_of_memory``, the compiler's account of it.
    """
    from jaxlib import _jax

    devices = _devices(slice_)
    module = _annotated(_jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(hlo)), description, len(devices))
    options = _jax.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(devices)
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, len(devices)
    build.use_spmd_partitioning = True
    build.allow_spmd_sharding_propagation_to_output = [True]
    # Devices count up along the mesh, as PyTorch/XLA's do.
    build.device_assignment = _jax.DeviceAssignment.create(np.array([[device.id for device in devices]]))
    try:
        executable = devices[0].client.compile(module, _jax.DeviceList(tuple(devices)), options)
    except _jax.XlaRuntimeError as error:
        if not str(error).startswith(OUT_OF_MEMORY):
            raise
        return {"out_of_memory": str(error)}
    found = executable.get_compiled_memory_stats()
    kinds = ("argument", "output", "alias", "generated_code")
    memory = {kind: getattr(found, f"{kind}_size_in_bytes") for kind in kinds}
    memory["peak"] = found.peak_memory_in_bytes
    return {"hlo": executable.hlo_modules()[0].to_string(), "memory": memory}


def _devices(slice_: Topology) -> list[Any]:
    """The slice's chips as the compiler knows them, in the order of their ids."""
    from jax.experimental import topologies

    shape = slice_.shape
    options: dict[str, Any] = {}
    if slice_.num_chips == 1:
        options["chips_per_host_bounds"] = (1,) * 3
    elif len(shape) == 3 and min(shape) >= 4:
        # Optical switches close these rings. Without them the compiler makes all-reduces of all-gathers.
        options["wrap"] = (True,) * 3
    name = f"{slice_.chip.name}:{'x'.join(map(str, shape))}"
    devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    return sorted(devices, key=lambda device: device.id)


def _annotated(module: str, description: dict[str, Any], num_devices: int) -> bytes:
    """Write into a StableHLO module how arguments and results are split, and which result replaces which argument."""
    from jax._src.interpreters import mlir as jax_mlir
    from jaxlib.mlir import ir

    context = jax_mlir.make_ir_context()
    with context, ir.Location.unknown(context):
        parsed = ir.Module.parse(module)
        main = next(op for op in parsed.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main")
        number = ir.IntegerType.get_signless(32)
        arguments: list[dict[str, Any]] = [{} for _ in main.arguments]
        for index, argument in description["arguments"].items():
            if argument["sharding"]:
                arguments[int(index)]["mhlo.sharding"] = ir.StringAttr.get(argument["sharding"])
        for index, result in description["aliases"].items():
            arguments[int(index)]["tf.aliasing_output"] = ir.IntegerAttr.get(number, result)
        results = [{"mhlo.sharding": ir.StringAttr.get(s)} if s else {} for s in description["results"]]
        main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(a) for a in arguments])
        main.attributes["res_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(r) for r in results])
        parsed.operation.attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(number, num_devices)
        parsed.operation.attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(number, 1)
        return jax_mlir.module_to_bytecode(parsed)


def main() -> None:
    """Write ``OUT.json`` and, where it fits, ``OUT.hlo.txt``."""
    end_with_parent(signal.SIGKILL)
    os.environ["LIBTPU_INIT_ARGS"] = libtpu_arguments(os.environ.get("LIBTPU_INIT_ARGS", ""))
    graph, slice_, out = Path(sys.argv[1]), topology(sys.argv[2]), Path(sys.argv[3])
    description = json.loads(graph.with_suffix(".json").read_text())
    result = compile_graph(graph.with_suffix(".hlo").read_bytes(), description, slice_)
    if text := result.pop("hlo", None):
        out.with_suffix(".txt").write_text(text)
    out.with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
