"""The table of `tests.test_bad_input`: what is wrong, how it comes about, and what the one line says of it.

In messages and overrides, "{folder}", "{corpus}", "{tokenizer}" and "{model}" stand for the paths of a `Place`, and in
messages "..." for any text. Several overrides are joined by " + ".
"""

from __future__ import annotations

import collections
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_xla import hf
from gemma_xla.config import LoraSection
from gemma_xla.data.tokenizer import train_tokenizer
from gemma_xla.train.folder import RunFolder
from tests.adapters import random_adapter
from tests.hf.conftest import Weights
from tests.test_bad_data import LINES, cut, jsonl, parquet_file


@dataclass(frozen=True)
class Place:
    """Where a case happens. Only `folder` may change; the others are shared by all cases."""

    folder: Path
    corpus: Path
    tokenizer: Path
    # A run of two steps, and the model exported from it.
    run: Path
    model: Path
    monkeypatch: pytest.MonkeyPatch
    undo: ExitStack

    def filled(self, text: str) -> str:
        for name in ("folder", "corpus", "tokenizer", "model"):
            text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text

    def copy(self, name: str) -> Path:
        """A copy of one of the shared folders, free to be spoilt."""
        return Path(shutil.copytree(getattr(self, name), self.folder / name))


Prepare = Callable[[Place], None]


@dataclass(frozen=True)
class Case:
    area: str
    name: str
    overrides: str
    says: str
    prepare: Prepare = lambda place: None


def rewritten(path: Path, change: Callable[[dict], object]) -> None:
    """Let ``change`` work on what a JSON file holds."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


# The config.

CONFIG = {
    "train.steps=0": "train.steps is 0; must be greater than 0",
    "train.steps=-1": "train.steps is -1; must be greater than 0",
    "train.steps=1.5": "train.steps is 1.5; must be a whole number",
    "train.steps=1000000000000": "train.steps is 1000000000000; must be less than 2147483648",
    "train.steps=many": "train.steps is 'many'; must be a whole number",
    "train.steps=null": "train: steps and epochs are both missing; give one of them",
    "train.batch_size=0": "train.batch_size is 0; must be greater than 0",
    "train.batch_size=-4": "train.batch_size is -4; must be greater than 0",
    "train.batch_size=2147483644": "train.batch_size: 2,147,483,644 rows of 32 tokens...GB of memory and...; lower one",
    "train.batch_size=null": "train: batch_size and batch_size_per_device are both missing; give exactly one of them",
    "train.batch_size_per_device=2": "train: batch_size and batch_size_per_device are 4 and 2; give exactly one",
    "train.grad_accum=0": "train.grad_accum is 0; must be greater than 0",
    "train.grad_accum=3": "train.batch_size is 4; it must be a multiple of grad_accum (3)",
    "train.loss_chunk=0": "train.loss_chunk is 0; must be greater than 0",
    "train.optimizer.lr=0": "train.optimizer.lr is 0; must be greater than 0",
    "train.optimizer.lr=-1": "train.optimizer.lr is -1; must be greater than 0",
    "train.optimizer.lr=.nan": "train.optimizer.lr is nan; must be a finite number",
    "train.optimizer.lr=1e999": "train.optimizer.lr is inf; must be a finite number",
    "train.optimizer.lr=1e38": "train.optimizer.lr is 1e+38; must be less than",
    "train.optimizer.eps=0": "train.optimizer.eps is 0; must be greater than 0",
    "train.optimizer.eps=1e39": "train.optimizer.eps is 1e+39; must be less than",
    "train.optimizer.beta1=1.0": "train.optimizer.beta1 is 1.0; must be less than 1",
    "train.optimizer.beta2=-0.1": "train.optimizer.beta2 is -0.1; must be greater than or equal to 0",
    "train.optimizer.weight_decay=-0.1": "train.optimizer.weight_decay is -0.1; must be greater than or equal to 0",
    "train.optimizer.clip_norm=-1": "train.optimizer.clip_norm is -1; must be greater than or equal to 0",
    "train.schedule.warmup_steps=-1": "train.schedule.warmup_steps is -1; must be greater than or equal to 0",
    "train.schedule.final=1.5": "train.schedule.final is 1.5; must be less than or equal to 1",
    "train.schedule.kind=wsd": "train: schedule.kind is 'wsd' and schedule.decay_steps is 0; wsd needs decay_steps",
    "train.schedule={kind: wsd, warmup_steps: 4, decay_steps: 4}": (
        "train: schedule.warmup_steps (4) and schedule.decay_steps (4) do not fit into 6 steps; lower them, or raise"
    ),
    "train.reduce_dtype=bfloat16": "train.reduce_dtype is 'bfloat16'; must be 'auto', 'compute' or 'float32'",
    "train.compute_dtype=int8": "train.compute_dtype is 'int8'; must be 'auto', 'float32' or 'bfloat16'",
    "train.stepz=3": "unknown key 'train.stepz'; did you mean 'train.steps'?",
    "seed=-1": "seed is -1; must be greater than or equal to 0",
    "seed=1180591620717411303424": "seed is 1180591620717411303424; must be less than 9223372036854775808",
    "data.seq_len=1": "data.seq_len is 1; must be greater than or equal to 2",
    "data.seq_len=0": "data.seq_len is 0; must be greater than or equal to 2",
    "data.seq_len=128": "data.seq_len is 128 but the model's max_position_embeddings is 64; shorten the rows, or raise",
    "data.prefetch=0": "data.prefetch is 0; must be greater than 0",
    "data.prefetch=2147483647": "train.batch_size: 4 rows of 32 tokens, 2147483647 batches ahead (data.prefetch)...;",
    "data.eval_fraction=1": "data.eval_fraction is 1; must be less than 1",
    "data.train={path: a.txt, weight: 0}": "data.train[0].weight is 0; must be greater than 0",
    "data.train={path: a.txt, weight: 1e39}": "data.train[0].weight is 1e+39; must be less than",
    "data.train=[]": "data.train is []; must have at least one entry",
    "checkpoint.every=-1": "checkpoint.every is -1; must be greater than or equal to 0",
    "checkpoint.keep_last=0": "checkpoint.keep_last is 0; must be greater than 0",
    "checkpoint.every=2 + checkpoint.keep_every=3": "checkpoint: keep_every is 3; it must be a multiple of every",
    "checkpoint.accept_changes=[train.optimizr.lr]": "...accept_changes...'train.optimizr.lr'; ...",
    "eval.every=-1": "eval.every is -1; must be greater than or equal to 0",
    "eval.batches=0": "eval.batches is 0; must be greater than 0",
    "export.dtype=int8": "export.dtype is 'int8'; must be 'float32', 'bfloat16' or 'float16'",
    "export.max_shard_size=5 potatoes": "...max_shard_size is '5 potatoes'; ",
    "export.max_shard_size=0GB": "...max_shard_size is '0GB'; ",
    "watch.hang_factor=1.5": "watch: hang_factor is 1.5; it must be 0, which turns it off, or at least 2",
    "watch.spike=1": "watch: spike is 1; it must be 0, which turns it off, or at least 3",
    "watch={hang_floor: 60, hang_limit: 50}": "watch: hang_limit is 50 and hang_floor 60; it must not be less",
    "watch.heartbeat=0": "watch.heartbeat is 0; must be greater than 0",
    "watch.hang_limit=2e6": "watch.hang_limit is 2000000.0; must be less than or equal to 1000000",
    "log.trackers=[wandb]": "log.trackers names wandb, not installed here; install it, or leave it out",
    "log.trackers=[abacus]": "log.trackers is ['abacus']: ...abacus. Choose between ",
    "hardware.price=-1": "hardware.price is -1; must be greater than or equal to 0",
    'output_dir=""': "output_dir is ''; ",
    "model.preset=gemma-9b": "model.preset: no preset 'gemma-9b' (did you mean 'gemma-7b'?); there are gemma-2b, ",
    'model.preset=""': "model.preset...''...; ",
    "model.init_from=there": "model: preset is 'gemma-test' and init_from is 'there'; give one of them",
    "model.overrides.hidden=64": "model: unknown field 'hidden' (did you mean 'hidden_size'?)",
    "model.overrides.qk=1": "model: unknown field 'qk'; there are vocab_size, ",
    "model.overrides.vocab_size=0": "model: vocab_size is 0; ",
    "model.overrides.hidden_size=-48": "model: hidden_size is -48; ",
    "model.overrides.vocab_size=1000000000000000000000000": "model: vocab_size is 1000000000000000000000000; ",
    "model.overrides.hidden_size=4611686018427387904": "model: hidden_size is 4611686018427387904; ",
    "model.overrides.num_hidden_layers=1000000000": "model: training ... parameters on the CPU takes ...; choose",
    "model.overrides.num_attention_heads=0": "model: num_attention_heads is 0; ",
    "model.overrides.num_key_value_heads=3": "model: num_attention_heads (4) is not a multiple of ...(3); ",
    "model.overrides.head_dim=15": "model: head_dim is 15; rotary embeddings need an even number",
    "model.overrides.rope_theta=.inf": "model: rope_theta is inf; ",
    "model.overrides.initializer_range=1e300": "model: initializer_range is 1e+300; ",
    "model.overrides.rms_norm_eps=.nan": "model: rms_norm_eps is nan; ",
    "model.overrides.sliding_window=0": "model: sliding_window is 0; ",
    "model.overrides.sliding_window=8 + model.overrides.layer_types=[sliding_attention, full_attention]": (
        "...layer_types has sliding layers, which Hugging Face's Gemma does not know; "
    ),
    "train.steps": "--set 'train.steps': write it as key=value, such as train.steps=10",
    "train.steps.more=1": "--set 'train.steps.more=1': train.steps has no keys; set it as a whole",
    "data.train=[a": "--set data.train, line 1: not valid YAML: ...; text with such characters needs quotes",
}


def appended(text: str) -> Prepare:
    """More text at the end of the config file, which is then at fault."""

    def prepare(place: Place) -> None:
        with (place.folder / "run.yaml").open("a") as file:
            file.write(text)

    return prepare


def small_machine(place: Place) -> None:
    """16 GiB of memory."""
    known, real = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}, os.sysconf
    place.monkeypatch.setattr(os, "sysconf", lambda name: known[name] if name in known else real(name))


YAML = {
    "a tab": ("\tseed: 1\n", "line ...: not valid YAML: ...; "),
    "a list that does not end": ("seed: [1\n", "line ...: not valid YAML: ...; "),
    "a key twice": ("train: {}\n", "line ...: not valid YAML: the key 'train' is there twice...; "),
}

# Data.


def written(**files: bytes) -> Prepare:
    """Text files; "_" in their names stands for "."."""

    def prepare(place: Place) -> None:
        (place.folder / "text").mkdir()
        for name, data in files.items():
            (place.folder / "text" / name.replace("_", ".")).write_bytes(data)

    return prepare


CHAT = [{"role": "user", "content": "he"}, {"role": "assistant", "content": "was"}]


def examples(bad: dict, good: dict | None = None) -> bytes:
    """40 examples; ``bad`` is line number 30."""
    lines = [json.dumps(good or {"prompt": "he", "completion": "was"})] * 40
    lines[29] = json.dumps(bad)
    return "\n".join(lines).encode()


def without_template(place: Place) -> None:
    rewritten(place.copy("tokenizer") / "tokenizer_config.json", lambda tree: tree.pop("chat_template"))
    (place.folder / "chats.jsonl").write_bytes(examples({"messages": CHAT}, {"messages": CHAT}))


GOOD = [json.loads(line)["text"] for line in LINES]
TEXT = "data.train={folder}/text"
ONE_SOURCE = "data.train[0].path: {folder}/text"
DATA = {
    "a malformed line": (
        written(a_jsonl=jsonl("{")),
        TEXT,
        ONE_SOURCE + "/a.jsonl:30 is not valid JSON ...'{'; correct",
    ),
    "a line that is no record": (
        written(a_jsonl=jsonl("7")),
        TEXT,
        ONE_SOURCE + "/a.jsonl:30 holds no record but '7'; ",
    ),
    "a line that is not UTF-8": (
        written(a_jsonl=jsonl(b'{"text": "\xf6"}')),
        TEXT,
        ONE_SOURCE + "/a.jsonl:30 is not UTF-8 text (byte 0xf6); convert",
    ),
    "text that is not UTF-8": (
        written(a_txt=b"he\nwas \xff"),
        TEXT,
        ONE_SOURCE + "/a.txt:2 is not UTF-8 text (byte 0xff);",
    ),
    "a record without the column": (
        written(a_jsonl=jsonl('{"txt": "he"}')),
        TEXT,
        "data.train[0].column: {folder}/text/a.jsonl:30 has no column 'text' (did you mean 'txt'?); it has txt",
    ),
    "a number for a text": (
        written(a_jsonl=jsonl('{"text": 42}')),
        TEXT,
        "data.train[0].column: column 'text' of {folder}/text/a.jsonl:30 holds int, not text: '42'; name another",
    ),
    "half a character": (
        written(a_jsonl=jsonl(r'{"text": "\ud83d"}')),
        TEXT,
        ONE_SOURCE + "/a.jsonl:30 holds half a surrogate pair, '\\ud83d', which is no character; correct",
    ),
    "empty documents only": (
        written(a_jsonl=b'{"text": ""}\n{"text": null}\n' * 9),
        TEXT,
        "data.train[0].path: there are no documents in '{folder}/text'; name text that is not empty",
    ),
    "no bytes": (written(a_txt=b""), TEXT, "data.train[0].path: there are no documents in '{folder}/text'; name"),
    "nothing held out of a document": (
        written(a_txt=b"he was"),
        TEXT + " + data.eval=null",
        "data.eval_fraction is 0.01, but data.train is a single document...; name other text in data.eval",
    ),
    "parquet cut short": (
        written(a_parquet=cut(parquet_file(text=GOOD))),
        TEXT,
        ONE_SOURCE + "/a.parquet is cut short, damaged, ...; fetch or write it again",
    ),
    "parquet without the column": (
        written(a_parquet=parquet_file(body=GOOD)),
        TEXT,
        "data.train[0].column: {folder}/text/a.parquet has no column 'text'; it has body",
    ),
    "gzip that is none": (
        written(a_jsonl_gz=jsonl()),
        TEXT,
        ONE_SOURCE + "/a.jsonl.gz is cut short, damaged, ...; fetch",
    ),
    "files of two kinds": (
        written(a_jsonl=jsonl(), b_txt=b"he"),
        TEXT,
        "data.train[0].path: it holds files of several kinds (json, text); name one",
    ),
    "an empty folder": (written(), TEXT, "data.train[0].path: '{folder}/text' matches no file; check the folder"),
    "no such file": (
        written(),
        TEXT + "/a.txt",
        "data.train[0].path: there is no file or folder '{folder}/text/a.txt'; ",
    ),
    "a pattern without a match": (
        written(),
        TEXT + "/*.txt",
        "data.train[0].path: '{folder}/text/*.txt' matches no file; ",
    ),
    "no name": (written(), "data.train=''", "data.train[0].path...''...; "),
    "a name too long": (
        written(),
        TEXT + "/" + "a" * 300,
        "data.train[0].path: ...{folder}/text/" + "a" * 300 + "...name too long...; ",
    ),
    "a bucket": (written(), "data.train=gs://bucket/a.txt", "data.train[0].path: ...gs://bucket/a.txt...; "),
    "a split of files": (
        written(a_txt=b"he"),
        "data.train={path: '{folder}/text', split: test}",
        "data.train[0]: 'subset' and 'split' are for hub data sets, not for files; remove them",
    ),
    "a malformed line held out": (
        written(a_jsonl=jsonl("{")),
        "data.eval={folder}/text",
        "data.eval[0].path: {folder}/text/a.jsonl:30 is not valid JSON ...'{'; correct",
    ),
    "the second source": (
        written(a_jsonl=jsonl("{")),
        "data.train=['{corpus}/train.jsonl', '{folder}/text']",
        "data.train[1].path: {folder}/text/a.jsonl:30 is not valid JSON ...'{'; correct",
    ),
    "a number for a prompt": (
        written(a_jsonl=examples({"prompt": 7, "completion": "he"})),
        TEXT,
        "data.train[0].prompt: column 'prompt' of {folder}/text/a.jsonl:30 holds int, not text: '7'; name another",
    ),
    "an empty completion": (
        written(a_jsonl=examples({"prompt": "he", "completion": " "})),
        TEXT,
        "data.train[0].completion: column 'completion' of {folder}/text/a.jsonl:30 is empty, ...; complete or remove",
    ),
    "a chat without an answer": (
        written(a_jsonl=examples({"messages": CHAT[:1]}, {"messages": CHAT})),
        TEXT,
        "data.train[0].messages: column 'messages' of {folder}/text/a.jsonl:30 is not a chat: no message has the role",
    ),
    "a chat without a template": (
        without_template,
        "data.train={folder}/chats.jsonl + data.tokenizer={folder}/tokenizer",
        "data.train[0]: it holds chats, but the tokenizer has no chat template; set data.chat_template=gemma or",
    ),
    "a role that the template refuses": (
        written(a_jsonl=examples({"messages": [{"role": "system", "content": "he"}, CHAT[1]]}, {"messages": CHAT})),
        TEXT,
        "data.train[0]: the chat template cannot be used for {folder}/text/a.jsonl:30: Gemma has no system role...; ",
    ),
    "a completion beyond the row": (
        written(a_jsonl=examples({"prompt": "he was " * 40, "completion": "he"})),
        TEXT,
        "data.train[0]: of {folder}/text/a.jsonl:30 nothing is left to learn: ...and data.seq_len is 32; raise",
    ),
    "no example fits": (
        written(a_jsonl=examples(*[{"prompt": "he", "completion": "he was " * 40}] * 2)),
        TEXT + " + data.too_long=drop",
        "data.train[0]: all of its 40 examples are longer than data.seq_len (32) and dropped; ...: raise data.seq_len",
    ),
    "a template that is not there": (
        written(a_jsonl=examples({"messages": CHAT}, {"messages": CHAT})),
        TEXT + " + data.chat_template={folder}/none.jinja",
        "data.chat_template: '{folder}/none.jinja' cannot be read (No such file or directory); name a Jinja file",
    ),
    "a template that is none": (
        written(a_jsonl=examples({"messages": CHAT}, {"messages": CHAT}), a_jinja=b"{% for m in %}"),
        "data.train={folder}/text/a.jsonl + data.chat_template={folder}/text/a.jinja",
        "data.chat_template: {folder}/text/a.jinja:1 is not a Jinja template: ...; correct it",
    ),
    "chats in a text file": (
        written(a_txt=b"he was"),
        "data.train={path: '{folder}/text', format: messages}",
        "data.train[0].format is 'messages', but '{folder}/text' is text; examples are records of .jsonl or .parquet",
    ),
    "a cache that cannot be written": (
        lambda place: place.monkeypatch.setattr(
            datasets.config, "HF_DATASETS_CACHE", place.folder / "run.yaml" / "cache"
        ),
        # Not as another case has read it.
        "data.train={path: '{corpus}/train.jsonl', sample_by: line}",
        "data.train[0].path: the text could not be written to the cache {folder}/run.yaml/cache: ...; free some space",
    ),
}

# The tokenizer.


def without(token: str) -> Prepare:
    """A tokenizer that lacks a special token."""

    def prepare(place: Place) -> None:
        lacking = {"tokenizer_class": "PreTrainedTokenizerFast", token: None}
        rewritten(place.copy("tokenizer") / "tokenizer_config.json", lambda tree: tree.update(lacking))

    return prepare


def spoilt(name: str, data: bytes | None) -> Prepare:
    """One file of the tokenizer with other contents, or without it."""

    def prepare(place: Place) -> None:
        path = place.copy("tokenizer") / name
        path.unlink() if data is None else path.write_bytes(data)

    return prepare


def no_vocabulary(place: Place) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        spoilt_folder = place.folder / "tokenizer"
        (spoilt_folder if spoilt_folder.exists() else place.copy("tokenizer")).joinpath(name).unlink()


COPY = "data.tokenizer={folder}/tokenizer"
NAMED = "data.tokenizer: '{folder}/tokenizer' "
UNREAD = "data.tokenizer: the tokenizer in '{folder}/tokenizer' cannot be read: "
TOKENIZER = {
    "no bos_token": (without("bos_token"), COPY, NAMED + "has no bos_token; use a tokenizer of the Gemma family"),
    "no eos_token": (without("eos_token"), COPY, NAMED + "has no eos_token; use a tokenizer of the Gemma family"),
    "no pad_token": (without("pad_token"), COPY, NAMED + "has no pad_token; use a tokenizer of the Gemma family"),
    "no vocabulary": (no_vocabulary, COPY, NAMED + "has no vocabulary; it needs tokenizer.json or tokenizer.model"),
    "cut short": (spoilt("tokenizer.json", b'{"version"'), COPY, UNREAD + "tokenizer.json: ...; copy the folder anew"),
    "settings cut short": (spoilt("tokenizer_config.json", b"{"), COPY, UNREAD + "tokenizer_config.json: ...; copy"),
    "too many tokens": (
        None,
        "model.overrides.vocab_size=480",
        "data.tokenizer: it has 500 tokens but ...480; set model",
    ),
    "another end": (
        None,
        "model.overrides.eos_token_id=7",
        "data.tokenizer: its eos_token_id is 1 but the model's is 7; ",
    ),
    "none": (None, "data.tokenizer=null", "data.tokenizer is missing; name a tokenizer, or set data.vocab_size"),
    "no such folder": (None, COPY, NAMED + "is neither a folder with a tokenizer nor ...; "),
    "a name too long": (None, f"data.tokenizer={'a' * 300}", f"data.tokenizer: ...{'a' * 300}...; "),
    "a size of zero": (None, "data.vocab_size=0", "data.vocab_size is 0; must be greater than 0"),
    "a size beyond the model": (
        None,
        "data.tokenizer=null + data.vocab_size=501",
        "data.vocab_size is 501 but the model's vocab_size is 500; lower it, or raise",
    ),
    "a size too small": (
        None,
        "data.tokenizer=null + data.vocab_size=480",
        "data.vocab_size is 480; 473 tokens are fixed...so set it to at least",
    ),
    "a size beyond the text": (
        None,
        "data.tokenizer=null + data.vocab_size=9000 + model.overrides.vocab_size=9000",
        "data.vocab_size is 9000, more than the training text supports; set it to at most",
    ),
}

# The model to start from.

WEIGHTS = "model.safetensors"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Prepare:
    """Other tensors."""

    def prepare(place: Place) -> None:
        path = place.copy("model") / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return prepare


def header(change: Callable[[dict], object]) -> Prepare:
    """The same bytes behind another header."""

    def prepare(place: Place) -> None:
        path = place.copy("model") / WEIGHTS
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        tree = json.loads(data[8 : 8 + size])
        change(tree)
        text = json.dumps(tree).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return prepare


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Prepare:
    def prepare(place: Place) -> None:
        path = place.copy("model") / name
        path.write_bytes(change(path.read_bytes()))

    return prepare


def described(**fields: object) -> Prepare:
    """Other fields in config.json; None: without it."""

    def prepare(place: Place) -> None:
        def change(tree: dict) -> None:
            tree.update(fields)
            for name in [name for name, value in fields.items() if value is None]:
                del tree[name]

        rewritten(place.copy("model") / "config.json", change)

    return prepare


def pickled(place: Place) -> None:
    path = place.copy("model") / WEIGHTS
    path.rename(path.with_name("pytorch_model.bin"))


def index_of_nothing(place: Place) -> None:
    path = place.copy("model") / WEIGHTS
    listed = dict.fromkeys(load_file(path), "model-00001-of-00002.safetensors")
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    path.unlink()


def lie(name: str, **fields: object) -> Prepare:
    return header(lambda tree: tree[name].update(fields))


FROM = "model={init_from: '{folder}/model'}"
MODEL = "model.init_from: {folder}/model"
INIT_FROM = {
    "a tensor missing": (weights(lambda t: t.pop(NORM)), f"{MODEL}: tensor {NORM} is missing; check that weights and"),
    "a tensor too many": (
        weights(lambda t: t.update(bias=torch.ones(3))),
        f"{MODEL}/{WEIGHTS}: tensor bias does not belong in a Gemma; check that",
    ),
    "a tensor of another shape": (
        weights(lambda t: t.update({NORM: torch.ones(47)})),
        f"{MODEL}/{WEIGHTS}: {NORM} has shape [47]; the config asks for [48]; check that",
    ),
    "a tensor of whole numbers": (
        weights(lambda t: t.update({NORM: torch.ones(48, dtype=torch.int32)})),
        f"{MODEL}/{WEIGHTS}: {NORM} is stored as int32; use one of float64, float32",
    ),
    "another output layer": (
        weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        f"{MODEL}/{WEIGHTS}: lm_head.weight differs from {EMBEDDING}; Gemma has one for both, so take",
    ),
    "a header with another shape": (lie(NORM, shape=[4800]), f"{MODEL}/{WEIGHTS}: ...{NORM} has shape [4800]...; "),
    "a header with other places": (
        lie(NORM, data_offsets=[0, 192]),
        f"{MODEL}/{WEIGHTS}: ...starts at byte 0 of the data...; write or",
    ),
    "a header with huge places": (lie(NORM, data_offsets=[0, 2**70]), f"{MODEL}/{WEIGHTS}: ...{2**70}...; "),
    "a header with another type": (lie(NORM, dtype="F99"), f"{MODEL}/{WEIGHTS}: ...{NORM} has dtype 'F99'...; "),
    "a header that announces too much": (
        bytes_of(WEIGHTS, lambda data: (2**62).to_bytes(8, "little") + data[8:]),
        f"{MODEL}/{WEIGHTS}: ...announce a header of {2**62} bytes...; write or download it again",
    ),
    "weights cut short": (bytes_of(WEIGHTS, cut), f"{MODEL}/{WEIGHTS}: ...its header describes ... bytes...; write or"),
    "weights of no bytes": (bytes_of(WEIGHTS, lambda _: b""), f"{MODEL}/{WEIGHTS}: ...the file has 0...; write or"),
    "pickled weights": (pickled, f"{MODEL}: neither {WEIGHTS} nor ...is there; convert weights"),
    "an index of a file that is not there": (
        index_of_nothing,
        f"{MODEL}/model-00001-of-00002.safetensors: cannot be read (there is no such file); ",
    ),
    "no config.json": (
        lambda place: (place.copy("model") / "config.json").unlink(),
        f"{MODEL}/config.json: No such file or directory; give the folder of a Hugging Face model",
    ),
    "config.json cut short": (bytes_of("config.json", cut), f"{MODEL}/config.json: not valid JSON: ...; write or"),
    "config.json of something else": (
        bytes_of("config.json", lambda _: b"[]"),
        f"{MODEL}/config.json: it must hold ...; ",
    ),
    "another model_type": (described(model_type="llama"), f"{MODEL}/config.json: model_type is 'llama'; only 'gemma'"),
    "a field missing": (described(head_dim=None), f"{MODEL}/config.json: head_dim missing; take config.json from"),
    "a field of another type": (described(head_dim="16"), f"{MODEL}/config.json: head_dim is '16'; it must be"),
    "a field below zero": (described(num_hidden_layers=-2), f"{MODEL}/config.json: num_hidden_layers is -2; it must"),
    "another architecture": (described(hidden_act="silu"), f"{MODEL}/config.json: hidden_act is 'silu'; only "),
    "more layers than weights": (
        described(num_hidden_layers=3),
        f"{MODEL}: tensor model.layers.2...is missing; check",
    ),
    "no such folder": (None, f"{MODEL}: no such folder, and ...; check"),
}

# A checkpoint to continue.

CHECKPOINT_FOLDER = "{folder}/run/checkpoints/step-00000002"
RUN_STATE = Path("checkpoints/step-00000002/state.json")


def continued(place: Place) -> None:
    place.copy("run")


def state(change: Callable[[dict], object]) -> Prepare:
    return lambda place: rewritten(place.copy("run") / RUN_STATE, change)


def other_text(place: Place) -> None:
    continued(place)
    lines = (place.corpus / "train.jsonl").read_text().splitlines(keepends=True)
    (place.folder / "other.jsonl").write_text("".join(reversed(lines)))


def damaged_checkpoint(place: Place) -> None:
    (file,) = (place.copy("run") / RUN_STATE.parent).glob("*.safetensors")
    file.write_bytes(cut(file.read_bytes()))


def other_tokenizer(place: Place) -> None:
    run = place.copy("run")
    shutil.rmtree(run / "tokenizer")
    train_tokenizer(["it is for the hat of his boat at his end"] * 40, 490, run / "tokenizer")


CONTINUED = {
    "another architecture": (
        continued,
        "model.overrides.hidden_size=64 + model.overrides.num_hidden_layers=3",
        f"checkpoint {CHECKPOINT_FOLDER}: it is of another model: hidden_size (48, now 64), num_hidden_layers (2, "
        "now 3); set the config back, or choose",
    ),
    "another learning rate": (
        continued,
        "train.optimizer.lr=0.02",
        f"checkpoint {CHECKPOINT_FOLDER}: the config has changed ...: train.optimizer.lr (0.01, now 0.02); set",
    ),
    "two other settings": (
        continued,
        "train.optimizer.beta1=0.8 + data.seq_len=16",
        f"checkpoint {CHECKPOINT_FOLDER}: ...data.seq_len (32, now 16), train.optimizer.beta1 (0.9, now 0.8); set",
    ),
    "another tokenizer": (
        other_tokenizer,
        "",
        f"checkpoint {CHECKPOINT_FOLDER}: the run's tokenizer is not the one it was trained with; put back",
    ),
    "other data": (
        other_text,
        "data.train={folder}/other.jsonl",
        "data.train[0]: its text is not that of the saved position; bring it back, or choose another output_dir",
    ),
    "fewer data": (
        continued,
        "data.train={corpus}/eval.jsonl",
        "data: the saved position has documents [40], but this run has [7]; continue with the same data",
    ),
    "other rows": (continued, "train.batch_size=8", "data: the saved position has ... 4, but this run has 8; continue"),
    "another seed": (continued, "seed=1", "data: the saved position has seed 0, but this run has 1; continue with"),
    "all damaged": (
        damaged_checkpoint,
        "",
        "{folder}/run/checkpoints: none of its 1 checkpoint(s) ...; restore one...bytes long",
    ),
    "a newer format": (
        state(lambda tree: tree.update(format="gemma_xla checkpoint 2")),
        "",
        "checkpoint {folder}/run/checkpoints/...: its format is 'gemma_xla checkpoint 2' and this gemma_xla reads "
        "'gemma_xla checkpoint 1'; use the version that wrote it",
    ),
    "a state of something else": (
        lambda place: (place.copy("run") / RUN_STATE).write_text("{}"),
        "",
        "{folder}/run/checkpoints: ...; restore one...state.json cannot be used: it was not written by gemma_xla",
    ),
    "resume: never": (
        continued,
        "checkpoint.resume=never",
        "output_dir: {folder}/run holds the checkpoint step-00000002; choose another folder, or checkpoint.resume=auto",
    ),
    "--resume never": (
        continued,
        "--resume=never",
        "output_dir: {folder}/run holds the checkpoint step-00000002; choose another folder, or checkpoint.resume=auto",
    ),
}

# Adapters, and what they stand beside.


def adapter(change: Callable[[dict], object] = lambda config: None, without: str = "") -> Prepare:
    """An adapter for the shared model, spoilt: its config changed, a file of it missing."""

    def prepare(place: Place) -> None:
        lora = LoraSection(rank=4, target_modules=["q_proj"])
        tensors = Weights(random_adapter(hf.load_model(place.model), lora))
        out = hf.export_adapter(tensors, lora, place.folder / "adapter", base_model=str(place.model))
        rewritten(out / "adapter_config.json", change)
        if without:
            (out / without).unlink()

    return prepare


def run_without_export(place: Place) -> None:
    shutil.rmtree(shutil.copytree(place.run, place.folder / "other") / "export")


ADAPTED = "model={init_from: '{folder}/adapter'}"
ADAPTER_FOLDER = "model.init_from: {folder}/adapter"
ADAPTER = {
    "an adapter beside an adapter": (
        adapter(),
        f"{ADAPTED} + lora={{rank: 4}}",
        f"{ADAPTER_FOLDER}: it is an adapter, beside which no other can be trained; run `gemma-xla export",
    ),
    "a base that is gone": (
        adapter(lambda config: config.update(base_model_name_or_path="{folder}/gone")),
        ADAPTED,
        f"{ADAPTER_FOLDER}/adapter_config.json: base_model_name_or_path: ...gone: no such folder, ...; or set it to",
    ),
    "no base": (
        adapter(lambda config: config.pop("base_model_name_or_path")),
        ADAPTED,
        f"{ADAPTER_FOLDER}/adapter_config.json: base_model_name_or_path is missing; set it to",
    ),
    "another kind of adapter": (
        adapter(lambda config: config.update(peft_type="IA3")),
        ADAPTED,
        f"{ADAPTER_FOLDER}/adapter_config.json: peft_type is 'IA3'; supported are 'LORA': merge it with peft",
    ),
    "an adapter of other modules": (
        adapter(lambda config: config.update(target_modules=["k_proj"])),
        ADAPTED,
        f"{ADAPTER_FOLDER}/adapter_model.safetensors: ...lora_A.weight does not belong to an adapter of k_proj; ",
    ),
    "an adapter of another rank": (
        adapter(lambda config: config.update(r=8)),
        ADAPTED,
        f"{ADAPTER_FOLDER}/adapter_model.safetensors: ...has shape [4, 48], but its config says ... is 8; take both",
    ),
    "an adapter without weights": (
        adapter(without="adapter_model.safetensors"),
        ADAPTED,
        f"{ADAPTER_FOLDER}: adapter_model.safetensors is not there; download it again",
    ),
    "a run that exported nothing": (
        run_without_export,
        "model={init_from: '{folder}/other'} + lora={rank: 4}",
        "model.init_from: {folder}/other: it is a run without the folder export/, ...; run `gemma-xla export",
    ),
}

# Fine-tuning.

TUNED = "model={init_from: '{model}'} + "
FINETUNE = {
    "lora={rank: 0}": "lora.rank is 0; must be greater than 0",
    "lora={rank: 4}": "lora: an adapter needs weights to stand beside, and model.init_from is missing; name",
    "lora={dropout: 1.0}": "lora.dropout is 1.0; must be less than 1",
    "lora={target_modules: []}": "lora.target_modules is []; must have at least one entry",
    "lora={r: 4}": "unknown key 'lora.r'; ",
    TUNED + "lora={rank: 49}": "lora.rank is 49, but k_proj is a matrix of ... x 48; choose at most",
    TUNED + "lora={target_modules: [qproj]}": "lora.target_modules: no module is called 'qproj'...; there are q_proj,",
    TUNED + "lora={target_modules: [lm_head]}": "lora.target_modules: no module is called 'lm_head'; there are q_proj,",
    TUNED + "lora={} + checkpoint.keep_best=true": "checkpoint.keep_best needs evaluations while training goes on, and",
    "eval.early_stopping_patience=2 + data.eval=null + data.eval_fraction=0": (
        "eval.early_stopping_patience needs held-out examples; name some in data.eval, or set data.eval_fraction"
    ),
    "export.push_to_hub=me/model + export.at_end=false": "export.push_to_hub is 'me/model', but export.at_end is false",
    "export.push_to_hub=me/model": "export.push_to_hub: me/model: ",
    f"eval.prompts=['{'it is ' * 64}']": "eval.prompts[0] has ... tokens and the model 64 positions; shorten it",
    "train.epochs=0": "train.epochs is 0; must be greater than 0",
    "train.steps=null + train.epochs=1 + data.train={path: '{corpus}/train.jsonl', streaming: true}": (
        "train.epochs: data.train[0] is a stream, and nobody knows its length; set train.steps instead"
    ),
}


def without_tokenizer(place: Place) -> None:
    model = place.copy("model")
    for path in (*model.glob("tokenizer*"), *model.glob("*.jinja")):
        path.unlink()


# The hub, without a connection.

HUB = {
    "data.train=no-one/no-data": "data.train[0].path: no local file is called 'no-one/no-data', and ...; check",
    "data.train={path: no-one/no-data, streaming: true}": "data.train[0].path: ...'no-one/no-data'...; check the name",
    "data.eval=no-one/no-data": "data.eval[0].path: no local file is called 'no-one/no-data', and ...; check",
    "model={init_from: no-one/no-model}": "model.init_from: no-one/no-model: no such folder, and ...; check",
    "model={init_from: a/b/c}": "model.init_from: a/b/c: no such folder, and it is not the name of a model...; check",
    "data.tokenizer=no-one/none": "data.tokenizer: 'no-one/none' is neither a folder with a tokenizer nor ...; ",
    "data.tokenizer=a/b/c": "data.tokenizer: 'a/b/c' is neither a folder with a tokenizer nor ...; ",
}

# The disk.


def full(place: Place) -> None:
    usage = collections.namedtuple("usage", "total used free")
    place.monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 1000))


def read_only(place: Place) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    place.monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def held(place: Place) -> None:
    other = RunFolder(str(place.folder / "run"))
    other.claim()
    place.undo.callback(other.close)


def something_else(place: Place) -> None:
    (place.folder / "run" / "export").mkdir(parents=True)
    (place.folder / "run" / "export" / "notes.txt").write_text("mine")


UNWRITABLE = "output_dir: nothing can be written to {} ({}); choose a folder you may write to"
DISK = {
    "a file": (None, "output_dir={folder}/run.yaml", UNWRITABLE.format("{folder}/run.yaml", "Not a directory")),
    "below a file": (None, "output_dir={folder}/run.yaml/a", UNWRITABLE.format("{folder}/run.yaml", "Not a directory")),
    "/proc": (None, "output_dir=/proc/run", UNWRITABLE.format("/proc", "...")),
    "/dev/null": (None, "output_dir=/dev/null/run", UNWRITABLE.format("/dev/null", "...")),
    "read-only": (read_only, "", UNWRITABLE.format("{folder}", "Read-only file system")),
    "full": (full, "", "output_dir: {folder}/run has room for 0.0 GB, but ... of this run need ... GB; make room"),
    "another run": (held, "", "output_dir: another run is writing to {folder}/run; wait for its end, stop it"),
    "a name too long": (None, f"output_dir={{folder}}/{'a' * 300}", f"output_dir: ...{'a' * 300}...name too long...; "),
    "a name of no bytes": (None, r'output_dir="{folder}/a\0b"', r"output_dir...{folder}/a...; "),
    "a bucket without its library": (
        None,
        "output_dir=nosuch://bucket/run",
        "...nosuch://bucket/run: such URLs cannot...; ",
    ),
    "an export that is something else": (
        something_else,
        "",
        "...{folder}/run/export: the folder holds something else than a model...; give another",
    ),
}

# Devices. This is plain PyTorch on one; `tests.test_cli` tries several.

DEVICES = {
    "mesh.fsdp=2": "mesh: data=1 x fsdp=2 x tensor=1 does not fit 1 device(s); make the product equal to that number",
    "mesh.fsdp=0": "mesh.fsdp is 0; give a number of devices, or -1",
    "mesh.data=-2": "mesh.data is -2; give a number of devices, or -1",
    "mesh.data=-1": "mesh: data and fsdp are both -1; only one axis can",
    "mesh.tensor=1.5": "mesh.tensor is 1.5; must be a whole number",
    "mesh.tensor=1000000000000000000000": "mesh: ...tensor=1000000000000000000000 does not fit 1 device(s); make",
    "mesh.virtual_devices=0": "mesh.virtual_devices is 0; must be greater than 0",
    "mesh.virtual_devices=4 + mesh.fsdp=3": "mesh: data=1 x fsdp=3 x tensor=1 does not fit 4 device(s); make",
    "train.layers=scan": "train.layers is 'scan', which needs PyTorch/XLA; set it to 'loop'",
    "train.precision=int8 + train.batch_size=4161": (
        "train.precision is 'int8', and a device has 133152 positions of a micro-batch; sums of more than 133144 "
        "overflow: raise train.grad_accum, or leave grad_weight out of train.int8_products"
    ),
    "hardware.chip=v5x": "hardware.chip: none is called 'v5x' (did you mean 'v5p'?); there are",
}


def without_compilers(place: Place) -> None:
    place.monkeypatch.setenv("PATH", str(place.folder))
    place.monkeypatch.delenv("CXX", raising=False)


COMPILERS = {
    "no compiler": (
        without_compilers,
        "train.compile=true",
        "train.compile is true, and there is no compiler that torch.compile could call (g++ or clang++); install one",
    )
}


def plain(area: str, table: dict[str, str]) -> Iterable[Case]:
    return (Case(area, overrides, overrides, says) for overrides, says in table.items())


def prepared(area: str, table: dict[str, tuple]) -> Iterable[Case]:
    for name, (prepare, overrides, says) in table.items():
        yield Case(area, name, overrides, says, prepare or Case.prepare)


CASES = [
    *plain("config", CONFIG),
    *(Case("config", name, "", says, appended(text)) for name, (text, says) in YAML.items()),
    Case(
        "config",
        "a model beyond the machine",
        "model={preset: gemma-7b}",
        "model: training 8,537,680,896 parameters on the CPU takes at least 136.6 GB of memory and ...; choose",
        small_machine,
    ),
    Case("config", "no file", "--config=none.yaml", "config none.yaml: No such file or directory; give the path"),
    *prepared("data", DATA),
    *prepared("tokenizer", TOKENIZER),
    *(Case("finetune", overrides, overrides, says) for overrides, says in FINETUNE.items()),
    Case(
        "finetune",
        "a base without a tokenizer",
        f"{FROM} + lora={{rank: 4}} + data.tokenizer=null",
        "data.tokenizer: '{folder}/model' has no vocabulary; it needs tokenizer.json or tokenizer.model",
        without_tokenizer,
    ),
    *(Case("init_from", name, FROM, says, prepare or Case.prepare) for name, (prepare, says) in INIT_FROM.items()),
    Case("init_from", "no name", "model={init_from: ''}", "model.init_from...''...; "),
    Case("init_from", "a name too long", f"model={{init_from: {'a' * 300}}}", f"model.init_from: {'a' * 300}...; "),
    *prepared("checkpoint", CONTINUED),
    *prepared("adapter", ADAPTER),
    *plain("hub", HUB),
    *prepared("disk", DISK),
    *plain("devices", DEVICES),
    *prepared("devices", COMPILERS),
]
