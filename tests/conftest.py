"""What all tests share: no network, caches of their own, one core; a tiny corpus, its tokenizer, and runs on them."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

_CACHE = tempfile.TemporaryDirectory(prefix="gemma-xla-tests-")
os.environ |= {
    "HF_HOME": _CACHE.name,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# accelerate decides as it is imported: runs in this process are plain PyTorch. Processes started here decide anew.
os.environ["USE_TORCH_XLA"] = "0"
import accelerate  # noqa: E402

del os.environ["USE_TORCH_XLA"]

import pytest  # noqa: E402
import yaml  # noqa: E402

from gemma_xla.config import RunConfig  # noqa: E402
from gemma_xla.config_file import load_config  # noqa: E402

WORDS = ["the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by"]
# 473 tokens are fixed; the rest is the alphabet of WORDS and a few pairs.
VOCAB_SIZE = 500

MakeConfig = Callable[..., RunConfig]


def make_texts(count: int, seed: int) -> list[str]:
    """Texts of one sentence or many, each beginning with a name of its own."""
    draw = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(draw.choices(WORDS, k=draw.choice([3, 10, 80]))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu() -> None:
    accelerate.PartialState(cpu=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.jsonl and eval.jsonl: sentences that repeat, which a tiny model learns in a few steps."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    sentences = ["he was in the hat with it", "it is for the hat and for his boat", "be at his boat by the end of it"]
    for name, count in (("train", 40), ("eval", 7)):
        texts = [" ".join(draw.choices(sentences, k=draw.randint(1, 4))) for _ in range(count)]
        write_jsonl(folder / f"{name}.jsonl", texts)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus, tmp_path_factory) -> Path:
    from gemma_xla.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()]
    train_tokenizer(texts, VOCAB_SIZE, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tree(corpus, tokenizer_folder) -> dict:
    """A run of seconds, as a config file holds it; it lacks an output_dir."""
    return {
        "model": {"preset": "gemma-test", "overrides": {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64}},
        "data": {
            "train": f"{corpus}/train.jsonl",
            "eval": f"{corpus}/eval.jsonl",
            "tokenizer": str(tokenizer_folder),
            "seq_len": 32,
        },
        "train": {
            "steps": 6,
            "batch_size": 4,
            "optimizer": {"lr": 0.01},
            "schedule": {"kind": "constant"},
            "loss_chunk": 16,
        },
        "export": {"dtype": "float32"},
        "log": {"trackers": []},
        "hardware": {"chip": "v5e"},
    }


@pytest.fixture(scope="session")
def tiny_file(tiny_tree) -> Callable[[Path], Path]:
    """Writes the tiny run's config for an output folder, beside it."""

    def write(folder: Path) -> Path:
        path = folder.with_name(f"{folder.name}.yaml")
        path.write_text(yaml.safe_dump({"output_dir": str(folder)} | tiny_tree))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_config(tiny_file) -> MakeConfig:
    """The tiny run's config for an output folder, with overrides such as ``"train.steps=3"``."""
    return lambda folder, *overrides: load_config(tiny_file(folder), list(overrides))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_config) -> Path:
    """The folder of a run that recipes/pretrain.py took to its end; leave it as it is."""
    from recipes.pretrain import main

    folder = tmp_path_factory.mktemp("runs") / "finished"
    main(tiny_config(folder, "train.steps=60", "log.trackers=[tensorboard]", "checkpoint.every=20"))
    return folder
