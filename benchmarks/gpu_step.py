"""What training Gemma on one GPU costs: this project beside the Trainer of `transformers`, in one run.

    python benchmarks/gpu_step.py                      # Gemma 2B, all weights; Gemma 7B, LoRA; 8192 tokens per row
    python benchmarks/gpu_step.py --case 2b --rows 4 --rounds 5 --json result.json
    python benchmarks/gpu_step.py --tiny               # tries the program itself out, on a CPU too

Equal random weights (no downloads), equal batches, bfloat16 beside float32 parameters, fused AdamW, clipping. Ours is
what `recipes/` run: torch.compile, attention in blocks. Theirs has the best attention that is installed, with and
without torch.compile. Each computes activations again only where memory demands it. They take turns, each time in a
process of its own that takes a few steps unmeasured first. Exits with 1 when the losses of the first step differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# accelerate decides as it is imported.
os.environ["USE_TORCH_XLA"] = "0"
import torch  # noqa: E402

from gemma_xla.chips import Chip, detect_gpu_chip, measure_cpu_peak  # noqa: E402
from gemma_xla.config import LoraSection, MeshSection, OptimizerSection, TrainSection  # noqa: E402
from gemma_xla.flops import FlopCounter  # noqa: E402
from gemma_xla.model.config import GemmaConfig, preset  # noqa: E402
from gemma_xla.model.gemma import init_parameter  # noqa: E402
from gemma_xla.model.lora import init_adapter, is_adapter  # noqa: E402

OPTIMIZER = OptimizerSection()
OURS = "ours"
# Steps that compile and warm up; they are not counted.
WARMUP = 3
# The largest relative difference of the first step's losses.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    config: GemmaConfig
    seq_len: int
    rows: int
    lora: LoraSection | None = None


LORA = LoraSection(rank=16)
CASES = {"2b": Case(preset("gemma-2b"), 8192, 2), "7b-lora": Case(preset("gemma-7b"), 8192, 1, LORA)}
_TINY = preset("gemma-test").replace(initializer_range=0.1)
TINY = {"2b": Case(_TINY, 64, 2), "7b-lora": Case(_TINY, 64, 2, LoraSection(rank=4))}


@dataclass(frozen=True)
class Turn:
    """What one contender did in one turn."""

    first_loss: float
    seconds: float
    peak_bytes: int


def make_batch(case: Case, number: int) -> dict[str, torch.Tensor]:
    """Full rows of one document each; frequent and rare tokens (Zipf's law)."""
    generator, first = torch.Generator().manual_seed(number), case.config.bos_token_id + 1
    frequency = 1.0 / torch.arange(1, case.config.vocab_size - first + 1)
    tokens = first + torch.multinomial(frequency, case.rows * case.seq_len, True, generator=generator)
    tokens = tokens.view(case.rows, case.seq_len)
    return {
        "input_ids": tokens.int(),
        "position_ids": torch.arange(case.seq_len, dtype=torch.int32).repeat(case.rows, 1),
        "segment_ids": torch.ones_like(tokens, dtype=torch.int32),
        "shift_labels": torch.cat((tokens[:, 1:], torch.full((case.rows, 1), -100)), dim=1),
    }


def starting_value(name: str, shape: torch.Size, dtype: torch.dtype, case: Case, device: torch.device) -> torch.Tensor:
    """The same for every contender: it depends on the name alone, and on the kind of device."""
    values = torch.empty(shape, device=device)
    if is_adapter(name):
        init_adapter(name, values, seed=0)
    else:
        init_parameter(name, values, case.config, seed=0)
    return values.to(dtype)


class Clock:
    """Times the steps after the warm-up, and sees what memory they needed."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.done = device, steps, 0

    def after_step(self) -> None:
        self.done += 1
        if self.done in (WARMUP, WARMUP + self.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if self.done == WARMUP:
                self._start = time.perf_counter()
            else:
                self.seconds = (time.perf_counter() - self._start) / self.steps

    def turn(self, first_loss: float) -> Turn:
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return Turn(first_loss, self.seconds, peak)


def ours(case: Case, device: torch.device, dtype: torch.dtype, remat: bool, steps: int) -> Turn:
    from gemma_xla.train.build import build_model
    from gemma_xla.train.optimizer import build_optimizer
    from gemma_xla.train.step import make_step
    from gemma_xla.xla import open_backend

    backend = open_backend(MeshSection(), use_xla=False, device=device)
    section = TrainSection(steps=1, batch_size=case.rows, remat="full" if remat else "none", optimizer=OPTIMIZER)

    def make(name, shape, _spec, dtype):
        return starting_value(name, shape, dtype, case, device)

    attention = backend.attention(case.config.head_dim, case.seq_len)
    model, specs = build_model(case.config, backend, make, attention, case.lora, dtype)
    optimizer = build_optimizer(model, specs, backend, OPTIMIZER)
    step = make_step(model, specs, optimizer, backend, section, dtype)
    clock, first_loss = Clock(device, steps), None
    for number in range(WARMUP + steps):
        result = step([make_batch(case, number)], OPTIMIZER.lr)
        first_loss = result[0].item() if first_loss is None else first_loss
        clock.after_step()
    return clock.turn(first_loss)


def theirs(case: Case, device: torch.device, dtype: torch.dtype, remat: bool, steps: int, *, compiled: bool) -> Turn:
    import transformers

    model = their_model(case, device, dtype)
    clock = Clock(device, steps)

    class Timing(transformers.TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            clock.after_step()

    class Trainer(transformers.Trainer):
        first_loss = None

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.first_loss is None:
                self.first_loss = loss.item()
            return loss

    batches = [make_batch(case, number)["input_ids"].long() for number in range(WARMUP + steps)]
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=WARMUP + steps,
            per_device_train_batch_size=case.rows,
            train_sampling_strategy="sequential",
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            torch_compile=compiled,
            gradient_checkpointing=remat,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            optim="adamw_torch_fused",
            learning_rate=OPTIMIZER.lr,
            lr_scheduler_type="constant",
            adam_beta1=OPTIMIZER.beta1,
            adam_beta2=OPTIMIZER.beta2,
            adam_epsilon=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            max_grad_norm=OPTIMIZER.clip_norm,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Timing()])
        trainer.train()
    return clock.turn(trainer.first_loss)


def their_model(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    """A Gemma of `transformers`, with adapters of `peft`; what is frozen is kept in ``dtype``."""
    import peft
    import transformers
    from transformers.utils import is_flash_attn_2_available

    fields = asdict(case.config)
    attention = "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"
    config = transformers.GemmaConfig(**fields, attn_implementation=attention)
    with device:
        kept_in = dtype if case.lora else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=kept_in)
    if case.lora:
        settings = peft.LoraConfig(
            r=case.lora.rank, lora_alpha=case.lora.alpha, target_modules=list(case.lora.target_modules)
        )
        model = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", "")
            parameter.copy_(starting_value(name, parameter.shape, parameter.dtype, case, device))
    model.config.use_cache = False
    return model.train()


CONTENDERS: dict[str, Callable[..., Turn]] = {
    OURS: ours,
    "transformers": partial(theirs, compiled=False),
    "transformers.compile": partial(theirs, compiled=True),
}


def attempt(name: str, *args: Any) -> Turn | None:
    """In a process of its own: a turn, or None if memory does not suffice."""
    try:
        return CONTENDERS[name](*args)
    except torch.OutOfMemoryError:
        return None


def take_turn(name: str, remat: dict[str, bool], case: Case, device: torch.device, dtype, steps: int) -> Turn:
    """A contender's turn; from its first failure on, it computes activations again.

    Raises:
        RuntimeError: memory does not suffice even so.
    """
    for again in (False, True) if not remat.get(name) else (True,):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            turn = pool.submit(attempt, name, case, device, dtype, again, steps).result()
        if turn:
            remat[name] = again
            return turn
    raise RuntimeError(f"{name}: out of memory with {case.rows} rows of {case.seq_len} tokens; lower --rows")


def summarize(turns: dict[str, list[Turn]], remat: dict[str, bool], case: Case, chip: Chip) -> dict[str, dict]:
    """What each contender reached, and how many times its speed ours is: median, smallest and largest of all rounds."""
    flops, tokens, summary = FlopCounter.of_run(case.config, case.seq_len, case.lora), case.rows * case.seq_len, {}
    for name, own in turns.items():
        rate = tokens / statistics.median(turn.seconds for turn in own)
        ratios = sorted(theirs.seconds / mine.seconds for mine, theirs in zip(turns[OURS], own, strict=True))
        summary[name] = {
            "tokens_per_second": rate,
            "mfu": flops.mfu(rate, chip.peak_flops.value),
            "peak_gb": max(turn.peak_bytes for turn in own) / 2**30,
            "remat": remat[name],
            "first_loss": own[0].first_loss,
            "ours_is": [statistics.median(ratios), ratios[0], ratios[-1]],
        }
    return summary


def report(title: str, summary: dict[str, dict]) -> None:
    print(f"\n{title}\n{'':22}{'tokens/s':>10}{'MFU':>8}{'peak GB':>9}{'remat':>7}{'loss 1':>11}   ours is (range)")
    for name, row in summary.items():
        median, low, high = row["ours_is"]
        print(
            f"{name:22}{row['tokens_per_second']:10,.0f}{row['mfu']:8.1%}{row['peak_gb']:9.1f}"
            f"{'yes' if row['remat'] else 'no':>7}{row['first_loss']:11.5f}   {median:.2f} ({low:.2f} to {high:.2f})",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="besides ours")
    parser.add_argument("--rows", type=int, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn that count")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on whatever is there: measures nothing")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU; --tiny tries the program out on the CPU")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    chip = measure_cpu_peak() if device.type == "cpu" else detect_gpu_chip(torch.cuda.get_device_name())
    names = [name for name in CONTENDERS if name == OURS or name in args.only]
    results, equal = {}, True
    for title in args.case:
        case = (TINY if args.tiny else CASES)[title]
        case = replace(case, rows=args.rows or case.rows)
        turns: dict[str, list[Turn]] = {name: [] for name in names}
        remat: dict[str, bool] = {}
        for number in range(args.rounds):
            for name in names if number % 2 == 0 else reversed(names):
                turns[name].append(take_turn(name, remat, case, device, dtype, args.steps))
        results[title] = summarize(turns, remat, case, chip)
        report(f"{title}, {case.rows} x {case.seq_len} tokens, {chip.name}", results[title])
        losses = [row["first_loss"] for row in results[title].values()]
        equal &= max(losses) / min(losses) - 1 <= TOLERANCES[dtype]
    print(f"\nlosses of the first step equal: {'yes' if equal else 'NO'}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
