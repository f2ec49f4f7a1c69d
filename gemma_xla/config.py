"""A run is one small, strict file: the schema, and how a file and command-line overrides become a `RunConfig`."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gemma_xla.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config: unknown keys and wrong types are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """Which Gemma to train."""

    preset: str = "gemma-2b"
    # GemmaConfig fields to change in the preset.
    overrides: dict[str, Any] = {}
    attention: Literal["auto", "reference", "sdpa"] = "auto"


class SourceSection(Section):
    """Where text comes from."""

    # A data set name on the Hugging Face hub, or a local file, folder or glob. "{stdlib}" stands for the folder of
    # Python's standard library, "~" for the home folder.
    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    # The column that holds the text (.jsonl, .parquet and hub data sets).
    column: str = "text"
    # For hub data sets: the split, the subset, and whether to read it without downloading it first.
    split: str = "train"
    subset: str | None = None
    streaming: bool = False


def _as_sources(value: Any) -> Any:
    """Accept a path, a source, or a list of either."""
    if isinstance(value, (str, dict)):
        value = [value]
    if isinstance(value, list):
        value = [{"path": item} if isinstance(item, str) else item for item in value]
    return value


Sources = Annotated[list[SourceSection], BeforeValidator(_as_sources), Field(min_length=1)]


class DataSection(Section):
    """What to train and evaluate on."""

    train: Sources
    # Held-out text; when absent, `eval_fraction` of the training documents is held out instead.
    eval: Sources | None = None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    # A folder or hub name with a tokenizer; when absent, one is trained on the training text with `vocab_size` tokens.
    tokenizer: str | None = None
    vocab_size: Positive | None = None
    seq_len: Annotated[int, Field(ge=2)] = 8192
    shuffle: bool = True
    # Batches made ready ahead of the step that needs them.
    prefetch: Positive = 2


class MeshSection(Section):
    """How devices are laid out. One axis may be -1: the devices that remain."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    # Devices to simulate on this machine's CPU; when absent, the devices that are there.
    virtual_devices: Positive | None = None


class OptimizerSection(Section):
    """AdamW (arXiv:1711.05101)."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    # Applied to matrices only: not to norms.
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    # Largest global gradient norm; 0 turns clipping off.
    clip_norm: Annotated[float, Field(ge=0)] = 1.0


class ScheduleSection(Section):
    """The learning rate over time, as a fraction of `optimizer.lr`."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: Count = 0
    # The fraction it ends at (cosine, linear, wsd).
    final: Fraction = 0.1
    # Length of the final descent (wsd: warm-up, stable, decay).
    decay_steps: Count = 0


class TrainSection(Section):
    """The optimisation itself."""

    steps: Positive
    # Rows per step. Give either the number for the whole mesh, or the number per micro-batch and per device along the
    # mesh's data and fsdp axes.
    batch_size: Positive | None = None
    batch_size_per_device: Positive | None = None
    # Micro-batches per step; their gradients add up to that of one large batch.
    grad_accum: Positive = 1
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    # "auto": bfloat16 on accelerators, float32 on CPUs. Parameters and optimizer state are float32 either way.
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # "full" keeps only each layer's input for the backward pass and computes the rest again.
    remat: Literal["none", "full"] = "none"
    # "scan" compiles one layer and loops over it (XLA only): compile time no longer grows with depth.
    layers: Literal["loop", "scan"] = "loop"
    # Positions per row whose logits exist at one time.
    loss_chunk: Positive = 512

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainSection:
        if (self.batch_size is None) == (self.batch_size_per_device is None):
            raise ValueError("give exactly one of batch_size and batch_size_per_device")
        return self

    def micro_batch_rows(self, batch_shards: int) -> int:
        """Rows of one micro-batch over the whole mesh.

        Raises:
            UserError: ``batch_size`` cannot be shared out evenly.
        """
        if self.batch_size_per_device is not None:
            return self.batch_size_per_device * batch_shards
        if self.batch_size % (self.grad_accum * batch_shards):
            raise UserError(
                f"train.batch_size is {self.batch_size}; it must be a multiple of grad_accum ({self.grad_accum}) times "
                f"the devices that share the batch ({batch_shards})"
            )
        return self.batch_size // self.grad_accum


class EvalSection(Section):
    """Evaluation on held-out text."""

    # Steps between evaluations; 0: only at the end.
    every: Count = 0
    # Batches per evaluation; when absent, all held-out text, once.
    batches: Positive | None = None


class CheckpointSection(Section):
    """Saving and resuming."""

    # Steps between checkpoints; 0: only at the end.
    every: Count = 0
    keep_last: Positive = 2
    # "auto" continues the newest complete checkpoint of the output folder, "never" refuses a folder that has one.
    resume: Literal["auto", "never"] = "auto"


class ExportSection(Section):
    """The Hugging Face folder written at the end."""

    at_end: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_shard_size: str = "5GB"


class LogSection(Section):
    """What a run reports, and where to."""

    # Names accelerate knows: tensorboard, wandb, ...
    trackers: list[str] = ["tensorboard"]
    # A text to continue at the end, as a sample.
    sample_prompt: str | None = None


class HardwareSection(Section):
    """The chip whose peak and price MFU and dollars refer to."""

    # A name from `gemma-xla chips`; "auto": the chip that is there.
    chip: str = "auto"
    # Dollars per chip-hour; when absent, the catalogue's list price.
    price: Annotated[float, Field(ge=0)] | None = None


class RunConfig(Section):
    """Everything that decides what a run computes."""

    output_dir: str
    seed: Count = 0
    model: ModelSection = ModelSection()
    data: DataSection
    mesh: MeshSection = MeshSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    log: LogSection = LogSection()
    hardware: HardwareSection = HardwareSection()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads ``1e-3`` as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply overrides such as ``train.steps=10``.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value is impossible.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}; give the path of a YAML file") from error
    tree = _parse(text, f"config {path}")
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: it must hold `key: value` lines, such as those in recipes/configs")
    for override in overrides:
        _override(tree, override)
    return validate(tree, str(path))


def validate(tree: dict[str, Any], origin: str) -> RunConfig:
    """Turn nested plain values into a `RunConfig`; ``origin`` is named in errors."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(f"config {origin}: {_explain(e)}" for e in error.errors())) from None


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML; `load_config` reads it back to an equal value."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{origin}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: write it as key=value, such as train.steps=10")
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {part!r} is a single value and has no fields")
    node[last] = _parse(value, f"--set {key}")


def _explain(error: dict[str, Any]) -> str:
    """One line: the field, the value, the way out."""
    # Lists show up as numbers in the location, unions and validators as names that no field has.
    field = ".".join(str(part) for part in error["loc"] if isinstance(part, int) or re.fullmatch(r"\w+", part))
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        *parents, name = field.split(".")
        section = _section(parents)
        valid = list(section.model_fields) if section else []
        close = difflib.get_close_matches(name, valid, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(valid)}"
        return f"unknown key {field!r}; {hint}"
    if kind == "missing":
        return f"{field} is missing; add it"
    return f"{field} is {value!r}; {error['msg'].removeprefix('Input ').removeprefix('Value error, ')}"


def _section(parts: list[str]) -> type[Section] | None:
    """The section that a dotted path of field names leads to."""
    node: Any = RunConfig
    for part in parts:
        if part.isdigit():
            continue
        node = node.model_fields[part].annotation
        if not (isinstance(node, type) and issubclass(node, Section)):
            node = SourceSection
    return node
