"""A run is one small, strict file. This is its schema; `gemma_xla.config_file` reads it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gemma_xla.config_base import Count, Fraction, NonNegativeFloat, Positive, PositiveFloat, Section, Text
from gemma_xla.config_data import DataSection
from gemma_xla.config_watch import WatchSection
from gemma_xla.errors import UserError, nearest
from gemma_xla.model.config import ACTIVATIONS, INT8_PRODUCTS, LORA_TARGETS


class ModelSection(Section):
    """Which Gemma to train."""

    # A name, such as gemma-2b (the default where there is no `init_from`).
    preset: Text | None = None
    # Start from the weights of a Hugging Face folder or hub id, or of a run of ours; its architecture then takes the
    # preset's place.
    init_from: Text | None = None
    # GemmaConfig fields to change.
    overrides: dict[str, Any] = {}
    # "auto": what suits the devices. "sdpa": PyTorch's fused kernels; "flex": those of its compiler, for a GPU.
    attention: Literal["auto", "reference", "sdpa", "flex"] = "auto"

    @model_validator(mode="after")
    def _one_architecture(self) -> ModelSection:
        if self.preset and self.init_from:
            raise ValueError(f"preset is {self.preset!r} and init_from is {self.init_from!r}; give one of them")
        return self


class LoraSection(Section):
    """Low-rank adapters (arXiv:2106.09685) beside frozen weights, which are kept in the compute dtype."""

    rank: Positive = 16
    # The adapters' output is scaled by alpha / rank, or by alpha / sqrt(rank) with `use_rslora` (arXiv:2312.03732).
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[Text], Field(min_length=1)] = list(LORA_TARGETS)
    use_rslora: bool = False
    # Also learn the length of each row of the adapted matrices (arXiv:2402.09353).
    use_dora: bool = False


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

    # How long: steps, or passes over data.train (of files and data sets that are not streamed), from which the steps
    # follow; with both, as in a resolved config, steps count.
    steps: Positive | None = None
    epochs: PositiveFloat | None = None
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
    # In which gradients of the layers' matrices are added up over devices: "compute", the compute dtype, or "float32".
    # "auto": the former with PyTorch/XLA, the latter between processes of plain PyTorch (docs/precision.md).
    reduce_dtype: Literal["auto", "compute", "float32"] = "auto"
    # "int8": the layers' matrix products (not the output layer's, nor attention's) are made of 8-bit integers, which
    # a TPU does at twice the speed of bfloat16. Nothing is stored in 8 bits (docs/int8.md).
    precision: Literal["default", "int8"] = "default"
    # With int8: which of a layer's three products; and how its gradients are rounded.
    int8_products: Annotated[list[Literal[INT8_PRODUCTS]], Field(min_length=1)] = list(INT8_PRODUCTS)
    int8_rounding: Literal["nearest", "stochastic"] = "nearest"
    # Without XLA: compile layers and loss with torch.compile. "auto": on a GPU; on a CPU it needs a C++ compiler.
    compile: bool | Literal["auto"] = "auto"
    # "full" keeps only each layer's input for the backward pass and computes the rest again; "none" computes nothing
    # twice; "auto" keeps as much as the devices' memory has room for, by arithmetic (what it came to is in the run's
    # config.yaml). `gemma-xla plan` asks the compiler.
    remat: Literal["auto", "none", "full"] = "auto"
    # With "full" and layers "scan": what is kept too, and in how many of the first layers (or "all"): q_proj, k_proj,
    # v_proj, attention, o_proj, gate_proj, up_proj (what these return). Where layers are not scanned, nothing more is.
    keep: dict[Literal[ACTIVATIONS], int | Literal["all"]] = {}
    # "scan" compiles one layer and loops over it (XLA only): compile time no longer grows with depth.
    layers: Literal["loop", "scan"] = "loop"
    # Positions per row whose logits exist at one time.
    loss_chunk: Positive = 512

    @field_validator("keep", mode="before")
    @classmethod
    def _keep_what_there_is(cls, keep: Any) -> Any:
        for name, layers in keep.items() if isinstance(keep, dict) else ():
            if name not in ACTIVATIONS:
                raise ValueError(
                    f"no activation is called {name!r}{nearest(str(name), ACTIVATIONS)}; there are "
                    f"{', '.join(ACTIVATIONS)}"
                )
            if layers != "all" and (type(layers) is not int or layers < 1):
                raise ValueError(f"{name} is {layers!r}; it must be 'all', or the number of layers, at least 1")
        return keep

    @model_validator(mode="after")
    def _keep_or_auto(self) -> TrainSection:
        if self.keep and self.remat == "auto":
            raise ValueError(
                f"keep is {self.keep} and remat is 'auto', which chooses what to keep by itself; set remat=full, or "
                "leave keep out"
            )
        return self

    @model_validator(mode="after")
    def _the_schedule_fits(self) -> TrainSection:
        schedule = self.schedule
        if (schedule.kind == "wsd") != bool(schedule.decay_steps):
            raise ValueError(
                f"schedule.kind is {schedule.kind!r} and schedule.decay_steps is {schedule.decay_steps}; wsd needs "
                "decay_steps, and nothing else takes them"
            )
        if self.steps and schedule.decay_steps and schedule.warmup_steps + schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps ({schedule.warmup_steps}) and schedule.decay_steps ({schedule.decay_steps}) do "
                f"not fit into {self.steps} steps; lower them, or raise steps"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        # Resolved, a run has both.
        if self.steps is None and self.epochs is None:
            raise ValueError("steps and epochs are both missing; give one of them")
        return self

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainSection:
        if (self.batch_size is None) == (self.batch_size_per_device is None):
            given = f"are {self.batch_size} and {self.batch_size_per_device}" if self.batch_size else "are both missing"
            raise ValueError(f"batch_size and batch_size_per_device {given}; give exactly one of them")
        return self

    def kept(self, num_layers: int) -> dict[str, int]:
        """In how many layers each named activation is kept for the backward pass; the rest is computed again."""
        if self.remat != "full":
            return dict.fromkeys(ACTIVATIONS, num_layers)
        return {name: num_layers if count == "all" else min(count, num_layers) for name, count in self.keep.items()}

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
    # Also evaluate before the first step.
    at_start: bool = False
    # Evaluations without a new lowest loss after which training stops.
    early_stopping_patience: Positive | None = None
    # Prompts to continue at each evaluation, and how far.
    prompts: list[Text] = []
    max_new_tokens: Positive = 48


class CheckpointSection(Section):
    """Saving and resuming."""

    # Steps between checkpoints; 0: only at the end.
    every: Count = 0
    keep_last: Positive = 2
    # Also keep those whose step is a multiple of this; 0: none.
    keep_every: Count = 0
    # Also keep the one with the lowest held-out loss, and export that.
    keep_best: bool = False
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
    """The Hugging Face folder written at the end: the model or, with LoRA, the adapter."""

    at_end: bool = True
    # With LoRA, also the model that has the adapter merged into its weights.
    merged: bool = False
    # Load the adapter with peft and compare its log-probabilities with ours.
    verify: bool = False
    # The hub repository to upload to, such as me/my-gemma; it is private unless it is there already.
    push_to_hub: Text | None = None
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
    # The TPU slice that `gemma-xla plan` plans for, such as v5e-256; several side by side: 2xv5e-256.
    topology: Text | None = None
    # Dollars per chip-hour; when absent, the catalogue's list price.
    price: NonNegativeFloat | None = None


class RunConfig(Section):
    """Everything that decides what a run computes."""

    # A folder, or a URL that fsspec knows, such as gs://bucket/run.
    output_dir: Text
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: ModelSection = ModelSection()
    # Absent: all weights are trained.
    lora: LoraSection | None = None
    data: DataSection
    mesh: MeshSection = MeshSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    log: LogSection = LogSection()
    watch: WatchSection = WatchSection()
    hardware: HardwareSection = HardwareSection()
