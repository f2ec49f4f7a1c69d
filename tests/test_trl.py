"""Fine-tuning beside TRL's SFTTrainer: the same examples, masks and settings give the same losses and weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from gemma_xla.config import RunConfig
from gemma_xla.data.chat import set_chat_template
from gemma_xla.data.documents import Corpus
from gemma_xla.data.loader import TrainLoader
from gemma_xla.data.tokenizer import load_tokenizer
from gemma_xla.model.config import preset
from gemma_xla.model.lora import init_adapter
from gemma_xla.train.metrics import read_metrics
from recipes.finetune import main
from tests.conftest import VOCAB_SIZE, WORDS
from tests.reference import assert_close, reference_model

pytestmark = pytest.mark.slow

STEPS, ROWS, MICRO_BATCHES, SEQ_LEN = 20, 8, 2, 48
LORA = "lora={rank: 4, alpha: 16, target_modules: [q_proj, v_proj, o_proj, down_proj]}"
# Gemma's turns, as Gemma's template writes them; TRL wants to be told which tokens are learnt.
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    "{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
)


def section(lr: float, clip_norm: float) -> str:
    """The config's ``train``: warm-up, decay, and a norm that is clipped in some steps and not in others."""
    optimizer = f"lr: {lr}, beta1: 0.8, beta2: 0.97, eps: 1e-7, weight_decay: 0.1, clip_norm: {clip_norm}"
    return (
        f"train={{steps: {STEPS}, batch_size: {ROWS}, grad_accum: {MICRO_BATCHES}, loss_chunk: 16, "
        f"optimizer: {{{optimizer}}}, schedule: {{kind: cosine, warmup_steps: 3, final: 0}}}}"
    )


def words(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))


def pairs() -> list[dict]:
    """Two epochs' worth of prompts and completions, of which some are longer than a row."""
    draw = random.Random(0)
    return [{"prompt": words(draw, 9) + "\n", "completion": words(draw, 30)} for _ in range(STEPS * ROWS // 2)]


def chats() -> list[dict]:
    """As many chats of one or two answers, of which some end with a question."""
    draw, rows = random.Random(1), []
    for _ in range(STEPS * ROWS // 2):
        turns = [{"role": ("user", "assistant")[i % 2], "content": words(draw, 7)} for i in range(draw.randint(2, 4))]
        rows.append({"messages": turns})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    config = preset("gemma-test").replace(vocab_size=VOCAB_SIZE, max_position_embeddings=64)
    reference_model(config).save_pretrained(folder)
    return folder


def ours(tiny_config, folder: Path, base: Path, tokenizer: Path, rows: list[dict], *overrides: str) -> RunConfig:
    """Run recipes/finetune.py on these examples; return the config it was given."""
    examples = folder.with_suffix(".jsonl")
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"train: {examples}, eval_fraction: 0, tokenizer: {tokenizer}, seq_len: {SEQ_LEN}, chat_template: gemma"
    given = [f"model={{init_from: {base}}}", f"data={{{data}, shuffle: false, packing: false}}", *overrides]
    config = tiny_config(folder, *given)
    main(config)
    return config


def trl(config: RunConfig, rows: list[dict], lora: peft.LoraConfig | None = None, **options) -> Trainer:
    """TRL's trainer with the same settings, ready to train."""
    # Seconds to import, and the default tests collect this file too.
    from trl import SFTConfig, SFTTrainer

    optimizer, schedule = config.train.optimizer, config.train.schedule
    args = SFTConfig(
        output_dir=f"{config.output_dir}-trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=SEQ_LEN + 1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=ROWS // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=STEPS,
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_norm,
        lr_scheduler_type=schedule.kind,
        warmup_steps=schedule.warmup_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    tokenizer = load_tokenizer(config.data.tokenizer)
    tokenizer.chat_template = MARKED
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(config.model.init_from, dtype=torch.float32),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )


def assert_same_examples(config: RunConfig, trainer: Trainer) -> None:
    """That both learn the same tokens from the same tokens before them, example by example."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    set_chat_template(tokenizer, config.data)
    count = len(trainer.train_dataset)
    with TrainLoader(Corpus(config.data, seed=0), tokenizer, num_rows=count, rows=range(count)) as loader:
        batch = next(loader)
    for example, ids, labels, segments in zip(
        trainer.train_dataset, batch["input_ids"], batch["shift_labels"], batch["segment_ids"], strict=True
    ):
        length = int(segments.sum())
        assert example["input_ids"][:-1] == ids[:length].tolist()
        assert example["labels"][1:] == labels[:length].tolist()
        assert (labels[length:] == -100).all()


def assert_same_curve(config: RunConfig, trainer: Trainer) -> None:
    records = [r for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "loss" in r]
    expected = [r for r in trainer.state.log_history if "loss" in r]
    for name in ("loss", "grad_norm"):
        found, wanted = ([r[name] for r in side] for side in (records, expected))
        assert len(found) == STEPS and found == pytest.approx(wanted, rel=0, abs=1e-4), name
    norms, limit = [r["grad_norm"] for r in records], config.train.optimizer.clip_norm
    assert min(norms) < limit < max(norms)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], name, tolerance=1e-4)


def test_lora_on_prompts_and_completions(base, tokenizer_folder, tiny_config, tmp_path):
    rows = pairs()
    config = ours(tiny_config, tmp_path / "run", base, tokenizer_folder, rows, LORA, section(2e-2, 1.0))
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=config.lora.target_modules, task_type="CAUSAL_LM")
    trainer = trl(config, rows, lora, completion_only_loss=True)
    assert_same_examples(config, trainer)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            init_adapter(name, parameter, config.seed)
    trainer.train()
    assert_same_curve(config, trainer)
    trainer.save_model(tmp_path / "trl")
    name = "adapter_model.safetensors"
    assert_same_tensors(tmp_path / "run" / "adapter" / name, tmp_path / "trl" / name)


def test_all_weights_on_the_answers_of_chats(base, tokenizer_folder, tiny_config, tmp_path):
    rows = chats()
    config = ours(tiny_config, tmp_path / "run", base, tokenizer_folder, rows, section(3e-3, 2.0))
    trainer = trl(config, rows, assistant_only_loss=True)
    assert_same_examples(config, trainer)
    trainer.train()
    assert_same_curve(config, trainer)
    trainer.save_model(tmp_path / "trl")
    assert_same_tensors(tmp_path / "run" / "export" / "model.safetensors", tmp_path / "trl" / "model.safetensors")
