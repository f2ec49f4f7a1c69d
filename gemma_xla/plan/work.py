"""Work a plan out: record the step, compile it, estimate; or, without the compiler, by arithmetic alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemma_xla.plan import children
from gemma_xla.plan.arithmetic import advice, available, bounds
from gemma_xla.plan.cache import versions
from gemma_xla.plan.children import PlanError, Progress
from gemma_xla.plan.combine import combine
from gemma_xla.plan.dcn import dcn_collective
from gemma_xla.plan.estimate import estimate
from gemma_xla.plan.figures import figures
from gemma_xla.plan.loops import UnreadableLoopError
from gemma_xla.plan.memory import memory_use
from gemma_xla.plan.result import Estimate, HbmUse, Plan
from gemma_xla.plan.setup import Setup, check

# Runs a module with arguments in a process of its own; the third is what it does.
Run = Callable[[str, Sequence[Path | str], str], None]


def work_out(setup: Setup, progress: Progress, timeout: float) -> tuple[Plan, list[str]]:
    """Return a plan, and the compiled programs that it is from.

    Args:
        setup: what to plan.
        progress: shows what is under way.
        timeout: seconds that recording, and compiling each graph, may take.

    Raises:
        UserError: the run would refuse to start, or the compiler failed (`PlanError`).
    """
    setup = setup.resolved()
    if not all(find_spec(name) for name in ("jax", "jaxlib", "libtpu", "torch_xla")):
        check(setup)
        note = f"the TPU compiler is not installed; for an estimate: {_install_line()}"
        return by_arithmetic(setup, note), []

    def run(module: str, arguments: Sequence[Path | str], stage: str) -> None:
        # The checks load PyTorch, as the first child does: seconds, of either.
        meanwhile = functools.partial(check, setup) if stage == "trace" else None
        children.run(module, arguments, stage, progress, timeout, meanwhile)

    try:
        with tempfile.TemporaryDirectory(prefix="gemma-xla-plan-") as folder:
            return _by_compiler(setup, list(_compiled(setup, Path(folder), run)))
    finally:
        progress.end()


def _by_compiler(setup: Setup, graphs: list[tuple[dict, dict, str | None]]) -> tuple[Plan, list[str]]:
    chip, mesh = setup.hardware.chip, setup.hardware.slice_mesh
    uses = [memory_use(compiled, description, available(chip)) for description, compiled, _ in graphs]
    memory = max(uses, key=lambda use: use.used)
    programs = [program for *_, program in graphs if program is not None]
    if len(programs) < len(graphs):
        return _plan(setup, memory), programs
    try:
        timed = [(estimate(program, chip, mesh), description["count"]) for description, _, program in graphs]
    except UnreadableLoopError as error:
        raise PlanError(f"the compiled program cannot be read: {error}") from error
    whole = combine(timed, dcn_collective(setup))
    return _plan(setup, memory, (whole.seconds, whole.upper_bound_seconds), estimate=whole), programs


def by_arithmetic(setup: Setup, note: str = "the TPU compiler was not asked") -> Plan:
    """Return a plan of bounds: what a step takes at least, in memory and in time.

    Args:
        note: why nothing was compiled.
    """
    setup = setup.resolved()
    memory, seconds = bounds(setup)
    return _plan(setup, memory, (seconds, seconds), compiled=False, notes=[note])


def _install_line() -> str:
    """What to type for the extra ``plan``, wherever this package came from."""
    packages = [line.partition(";")[0].strip() for line in requires("gemma_xla") or () if 'extra == "plan"' in line]
    return f"pip install {' '.join(packages)}"


def _compiled(setup: Setup, folder: Path, run: Run) -> Iterator[tuple[dict[str, Any], dict[str, Any], str | None]]:
    """Each graph's description, what the compiler said of it, and the program, where there is one."""
    question = {
        "config": setup.config.model_dump(),
        "model": dataclasses.asdict(setup.model),
        "mesh": dataclasses.asdict(setup.hardware.slice_mesh),
        "rows": setup.micro_batch_rows,
        "dtype": setup.dtype_name,
        "chip": setup.hardware.chip.name,
    }
    (folder / "question.json").write_text(json.dumps(question), encoding="utf-8")
    run("gemma_xla.plan.trace", [folder / "question.json", folder], "trace")
    graphs = sorted(folder.glob("*.hlo"), key=lambda path: int(path.stem))
    for graph in graphs:
        stage = "compile" if len(graphs) == 1 else f"compile graph {int(graph.stem) + 1} of {len(graphs)}"
        out = folder / f"compiled-{graph.stem}"
        run("gemma_xla.plan.compile", [graph.with_suffix(""), setup.hardware.slice.name, out], stage)
        program = out.with_suffix(".txt")
        text = program.read_text(encoding="utf-8") if program.exists() else None
        yield children.read(graph.with_suffix(".json")), children.read(out.with_suffix(".json")), text


def _plan(
    setup: Setup,
    memory: HbmUse,
    times: tuple[float, float] | None = None,
    *,
    compiled: bool = True,
    estimate: Estimate | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    config, hardware = setup.config, setup.hardware
    settings = {
        "model": config.model.init_from or config.model.preset or "gemma-2b",
        "seq_len": config.data.seq_len,
        "batch_size_per_device": setup.micro_batch_rows // hardware.slice_mesh.batch_shards,
        "grad_accum": config.train.grad_accum,
        "remat": config.train.remat,
        "layers": config.train.layers,
        "attention": config.model.attention,
        "compute_dtype": setup.dtype_name,
        "precision": config.train.precision,
        "lora_rank": config.lora and config.lora.rank,
    }
    if kept := ", ".join(f"{name} in {count}" for name, count in config.train.keep.items()):
        settings["keep"] = kept
    return Plan(
        config="",
        topology=hardware.name,
        chip=hardware.chip.name,
        num_chips=hardware.num_chips,
        mesh=dataclasses.asdict(hardware.mesh),
        settings=settings,
        rows=setup.rows,
        tokens_per_step=setup.rows * config.data.seq_len,
        compiled=compiled,
        memory=memory,
        estimate=estimate,
        figures=times and figures(setup, *times, None),
        advice=[] if memory.fits else advice(setup, memory),
        notes=[*setup.notes, *notes],
        versions=versions(),
    )
