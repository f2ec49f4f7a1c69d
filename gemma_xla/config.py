"""A run is one small, strict file. This is its schema; `gemma_xla.config_file` reads it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gemma_xla.errors import UserError

# Sizes and counts that a 32-bit integer holds, as the devices' own do.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
# What a float32 holds.
PositiveFloat = Annotated[float, Field(gt=0, lt=3e38)]
NonNegativeFloat = Annotated[float, Field(ge=0, lt=3e38)]
# A name or path: not empty, and without the one character that no path has.
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config: unknown keys, wrong types and NaN are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which Gemma to train."""

    # A name, such as gemma-2b (the default where there is no `init_from`).
    preset: Text | None = None
    # Start from the weights of a Hugging Face folder or hub id, whose config.json then takes the preset's place.
    init_from: Text | None = None
    # GemmaConfig fields to change.
    overrides: dict[str, Any] = {}
    attention: Literal["auto", "reference", "sdpa"] = "auto"

    @model_validator(mode="after")
    def _one_architecture(self) -> ModelSection:
        if self.preset and self.init_from:
            raise ValueError(f"preset is {self.preset!r} and init_from is {self.init_from!r}; give one of them")
        return self


class SourceSection(Section):
    """Where text comes from."""

    # A data set name on the Hugging Face hub, or a local file, folder or glob. "{stdlib}" stands for the folder of
    # Python's standard library, "~" for the home folder.
    path: Text
    weight: PositiveFloat = 1.0
    # The column that holds the text (.jsonl, .parquet and hub data sets).
    column: str = "text"
    # What of a text file is a document: all of it, what stands between blank lines, or a line.
    sample_by: Literal["document", "paragraph", "line"] = "document"
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
    tokenizer: Text | None = None
    vocab_size: Positive | None = None
    seq_len: Annotated[int, Field(ge=2, lt=2**31)] = 8192
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

    # At its limit, what Adam divides it by may still be small.
    lr: Annotated[float, Field(gt=0, le=1e30)] = 3e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    # Applied to matrices only: not to norms.
    weight_decay: NonNegativeFloat = 0.1
    # Largest global gradient norm; 0 turns clipping off.
    clip_norm: NonNegativeFloat = 1.0


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
    def _the_schedule_fits(self) -> TrainSection:
        schedule = self.schedule
        if (schedule.kind == "wsd") != bool(schedule.decay_steps):
            raise ValueError(
                f"schedule.kind is {schedule.kind!r} and schedule.decay_steps is {schedule.decay_steps}; wsd needs "
                "decay_steps, and nothing else takes them"
            )
        if schedule.decay_steps and schedule.warmup_steps + schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps ({schedule.warmup_steps}) and schedule.decay_steps ({schedule.decay_steps}) do "
                f"not fit into {self.steps} steps; lower them, or raise steps"
            )
        return self

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainSection:
        if (self.batch_size is None) == (self.batch_size_per_device is None):
            given = f"are {self.batch_size} and {self.batch_size_per_device}" if self.batch_size else "are both missing"
            raise ValueError(f"batch_size and batch_size_per_device {given}; give exactly one of them")
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
    # Also keep those whose step is a multiple of this; 0: none.
    keep_every: Count = 0
    # "auto" continues the newest complete checkpoint of the output folder, "never" refuses a folder that has one.
    resume: Literal["auto", "never"] = "auto"
    # Keys that may differ from the checkpoint's config though that changes results, such as [train.optimizer.lr].
    accept_changes: list[str] = []

    @model_validator(mode="after")
    def _kept_ones_exist(self) -> CheckpointSection:
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise ValueError(f"keep_every is {self.keep_every}; it must be a multiple of every, which is {self.every}")
        return self


class ExportSection(Section):
    """The Hugging Face folder written at the end."""

    at_end: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_shard_size: str = "5GB"


class LogSection(Section):
    """What a run reports, and where to."""

    # Names accelerate knows: tensorboard, wandb, ...
    trackers: list[str] = ["tensorboard"]
    # A text to continue with the exported model, as a sample.
    sample_prompt: str | None = None


class HardwareSection(Section):
    """The chip whose peak and price MFU and dollars refer to."""

    # A name from `gemma-xla chips`; "auto": the chip that is there.
    chip: str = "auto"
    # Dollars per chip-hour; when absent, the catalogue's list price.
    price: NonNegativeFloat | None = None


class RunConfig(Section):
    """Everything that decides what a run computes."""

    # A folder, or a URL that fsspec knows, such as gs://bucket/run.
    output_dir: Text
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: ModelSection = ModelSection()
    data: DataSection
    mesh: MeshSection = MeshSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    log: LogSection = LogSection()
    hardware: HardwareSection = HardwareSection()
