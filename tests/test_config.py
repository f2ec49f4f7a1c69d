"""Config files: every key is read, and each mistake is one line that names the field, the value and the way out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from gemma_xla.config import RunConfig, TrainSection
from gemma_xla.config_file import dump_config, load_config
from gemma_xla.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))
MINIMAL = "output_dir: out\ndata: {train: [a.txt], vocab_size: 600}\ntrain: {steps: 3, batch_size: 2}\n"
# What a reader of YAML knows nothing of.
JARGON = ("pydantic", "http", "Input", "dictionary", "instance", "Section", "None", "validation", "NoneType", "<")


@pytest.fixture
def load(tmp_path):
    """Read a config's text, with overrides."""

    def read(text: str = MINIMAL, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return read


def mistakes(load, text: str = MINIMAL, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load(text, *overrides)
    return str(error.value).split("\n")


def leaves(tree: dict, prefix: str = "") -> dict:
    """Dotted names to values; lists, and what stands for one, count as values."""
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inner = isinstance(value, dict) and name not in ("data.train", "data.eval")
        found |= leaves(value, f"{name}.") if inner else {name: value}
    return found


# Reading.


def sources(raw: str | dict | list) -> list[dict]:
    return [{"path": s} if isinstance(s, str) else s for s in (raw if isinstance(raw, list) else [raw])]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_config_arrives(path):
    raw, config = leaves(yaml.safe_load(path.read_text())), leaves(load_config(path).model_dump())
    for name, value in raw.items():
        if name in ("data.train", "data.eval"):
            for given, read in zip(sources(value), config[name], strict=True):
                assert given.items() <= read.items()
        else:
            # PyYAML reads 1e-3 as text.
            assert config[name] == (float(value) if isinstance(config[name], float) else value), name


def test_the_quickstart_says_what_it_says():
    config = load_config(next(path for path in CONFIGS if path.stem == "quickstart"))
    assert config.train.optimizer.weight_decay == 0.05
    assert config.train.optimizer.beta2 == 0.95  # a default
    assert (config.mesh.virtual_devices, config.train.batch_size, config.model.preset) == (4, 8, "gemma-tiny")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("3E-4", 3e-4), ("1.5e-3", 1.5e-3), (".5e-2", 5e-3), ("1.e-3", 1e-3), ("2e+0", 2.0), ("1", 1.0)],
)
def test_numbers_are_numbers(load, text, value):
    in_file = load(MINIMAL.replace("batch_size: 2", f"batch_size: 2, optimizer: {{lr: {text}}}"))
    as_override = load(MINIMAL, f"train.optimizer.lr={text}")
    assert in_file.train.optimizer.lr == as_override.train.optimizer.lr == value


@pytest.mark.parametrize("text", ["2024-01-01", "1e", "e5", "1-3", "runs/1e-3"])
def test_text_stays_text(load, text):
    assert load(MINIMAL, f"output_dir={text}").output_dir == text


def test_overrides(load):
    config = load(
        MINIMAL,
        "train.steps=7",
        "mesh.tensor=2",  # a section that the file lacks
        "model.overrides.num_hidden_layers=3",
        "data.eval=[b.txt, {path: c, weight: 2.5}]",
        "log.sample_prompt=a = b",
        "train.batch_size=null",
        "train.batch_size_per_device=4",
        "train.steps=8",
    )
    assert (config.train.steps, config.mesh.tensor) == (8, 2)
    assert config.model.overrides == {"num_hidden_layers": 3}
    assert [(source.path, source.weight) for source in config.data.eval] == [("b.txt", 1.0), ("c", 2.5)]
    assert config.log.sample_prompt == "a = b"
    assert (config.train.batch_size, config.train.batch_size_per_device) == (None, 4)


@pytest.mark.parametrize("value", ["a.txt", "[a.txt]", "{path: a.txt}", "[{path: a.txt}]"])
def test_sources_may_be_written_briefly(load, value):
    (source,) = load(MINIMAL, f"data.train={value}").data.train
    assert (source.path, source.column, source.weight, source.streaming) == ("a.txt", "text", 1.0, False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_dumped_config_reads_back_as_it_was(path, tmp_path):
    odd = ["output_dir=2024-01-01", "log.sample_prompt='é: [1e-3] # \"no\"\n\ttrue'", "train.optimizer.eps=1e-9"]
    config = load_config(path, odd)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config
    assert load_config(copy, ["seed=8"]) != config


def test_a_config_is_immutable(load):
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 4


# Mistakes.

NOT_A_NUMBER = "{} is {}; must be a finite number"
# What is set -> what the line says after "config FILE: ".
WRONG_VALUES = {
    "train.stepz=3": "unknown key 'train.stepz'; did you mean 'train.steps'?",
    "trian.steps=3": "unknown key 'trian'; did you mean 'train'?",
    "steps=3": "unknown key 'steps'; did you mean 'train.steps'?",
    "train.lr=3": "unknown key 'train.lr'; did you mean 'train.optimizer.lr'?",
    "optimizer.lr=3": "unknown key 'optimizer'; did you mean 'train.optimizer'?",
    "export.foo=3": (
        "unknown key 'export.foo'; valid keys here: at_end, merged, verify, push_to_hub, dtype, max_shard_size"
    ),
    "data.train={pth: a}": "unknown key 'data.train[0].pth'; did you mean 'data.train[0].path'?",
    "data.train=[a, {path: b, wieght: 2}]": "unknown key 'data.train[1].wieght'; did you mean 'data.train[1].weight'?",
    "mesh={1: 2}": "unknown key 'mesh[1]'; keys must be text",
    "model.overrides={1: 2}": "unknown key 'model.overrides[1]'; keys must be text",
    "train.optimizer.lr=0": "train.optimizer.lr is 0; must be greater than 0",
    "train.optimizer.lr=-1e-3": "train.optimizer.lr is -0.001; must be greater than 0",
    "train.optimizer.lr=.nan": NOT_A_NUMBER.format("train.optimizer.lr", "nan"),
    "train.optimizer.lr=.inf": NOT_A_NUMBER.format("train.optimizer.lr", "inf"),
    "hardware.price=.nan": NOT_A_NUMBER.format("hardware.price", "nan"),
    "train.optimizer.lr='1e-3'": "train.optimizer.lr is '1e-3'; must be a number",
    "train.optimizer.beta1=1": "train.optimizer.beta1 is 1; must be less than 1",
    "train.steps=0": "train.steps is 0; must be greater than 0",
    "train.steps=-2": "train.steps is -2; must be greater than 0",
    "train.steps=2.5": "train.steps is 2.5; must be a whole number",
    "train.steps=2.0": "train.steps is 2.0; must be a whole number",
    "train.steps=true": "train.steps is true; must be a whole number",
    "train.steps=": "train: steps and epochs are both missing; give one of them",
    "train.steps=3=4": "train.steps is '3=4'; must be a whole number",
    "train=": "train is empty; must hold `key: value` pairs",
    "mesh=4": "mesh is 4; must hold `key: value` pairs",
    "seed=-1": "seed is -1; must be greater than or equal to 0",
    "data.seq_len=1": "data.seq_len is 1; must be greater than or equal to 2",
    "data.shuffle=1": "data.shuffle is 1; must be true or false",
    "data.train=[]": "data.train is []; must have at least one entry",
    "data.train=3": "data.train is 3; must be a list, such as [a, b]",
    "data.train=[a, 3]": "data.train[1] is 3; must hold `key: value` pairs",
    "data.train={path: a, weight: 0}": "data.train[0].weight is 0; must be greater than 0",
    "data.eval={path: 3}": "data.eval[0].path is 3; must be text; quote what YAML would read as something else",
    "output_dir=no": "output_dir is false; must be text; quote what YAML would read as something else",
    "log.trackers=tensorboard": "log.trackers is 'tensorboard'; must be a list, such as [a, b]",
    "train.remat=some": "train.remat is 'some'; must be 'auto', 'none' or 'full'",
    "train.keep={atention: all}": (
        "train.keep: no activation is called 'atention' (did you mean 'attention'?); there are q_proj, k_proj, v_proj, "
        "attention, o_proj, gate_proj, up_proj, gated"
    ),
    "train.keep={k_proj: x}": "train.keep: k_proj is 'x'; it must be 'all', or the number of layers, at least 1",
    "train.keep={o_proj: 0}": "train.keep: o_proj is 0; it must be 'all', or the number of layers, at least 1",
    "train.keep=attention": "train.keep is 'attention'; must hold `key: value` pairs",
    "train.schedule.kind=cos": "train.schedule.kind is 'cos'; must be 'cosine', 'linear', 'constant' or 'wsd'",
    "checkpoint.resume=no": "checkpoint.resume is false; must be 'auto' or 'never'",
    "train.batch_size_per_device=3": (
        "train: batch_size and batch_size_per_device are 2 and 3; give exactly one of them"
    ),
    "train.batch_size=null": ("train: batch_size and batch_size_per_device are both missing; give exactly one of them"),
}


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_a_wrong_value_is_one_line(load, tmp_path, override):
    (line,) = mistakes(load, MINIMAL, override)
    assert line == f"config {tmp_path / 'run.yaml'}: {WRONG_VALUES[override]}"
    assert not any(word in WRONG_VALUES[override] for word in JARGON)


# The file's text -> what follows "config FILE".
WRONG_FILES = {
    "": ": it must hold `key: value` lines, such as those in recipes/configs",
    "- a\n": ": it must hold `key: value` lines, such as those in recipes/configs",
    "a: [1\nb: 2\n": ", line 2: not valid YAML: expected ',' or ']', but got ':'",
    "a: 1\n\tb: 2\n": ", line 2: not valid YAML: found character '\\t' that cannot start any token",
    "a: \0": ": not valid YAML: unacceptable character #x0000: special characters are not allowed",
    "a: !!int b": ": not valid YAML: invalid literal for int() with base 10: 'b'",
    MINIMAL + "seed: 1\nseed: 2\n": ", line 5: not valid YAML: the key 'seed' is there twice",
    "x: !!python/object/apply:os.getcwd []": (
        ", line 1: not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.getcwd'"
    ),
    MINIMAL.replace("output_dir: out", "seed: 1"): ": output_dir is missing; add it",
    MINIMAL.replace("steps", "step"): ": unknown key 'train.step'; did you mean 'train.steps'?",
    MINIMAL.replace("steps: 3, ", ""): ": train: steps and epochs are both missing; give one of them",
    MINIMAL.replace("data:", "dta:"): ": unknown key 'dta'; did you mean 'data'?",
}


@pytest.mark.parametrize("text", WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_wrong_file_is_one_line(load, tmp_path, text):
    (line,) = mistakes(load, text)
    way_out = "; correct the file there" if "not valid YAML" in line else ""
    assert line == f"config {tmp_path / 'run.yaml'}{WRONG_FILES[text]}{way_out}"


# The override -> the whole message.
WRONG_OVERRIDES = {
    "train.steps": "--set 'train.steps': write it as key=value, such as train.steps=10",
    "=3": "--set '=3': write it as key=value, such as train.steps=10",
    "train..steps=3": "--set 'train..steps=3': write it as key=value, such as train.steps=10",
    "train.steps.x=3": "--set 'train.steps.x=3': train.steps has no keys; set it as a whole",
    "data.train.path=b": "--set 'data.train.path=b': data.train has no keys; set it as a whole",
    "train={steps: 3": (
        "--set train, line 1: not valid YAML: expected ',' or '}', but got '<stream end>'; text with such characters "
        "needs quotes of its own: --set 'train=\"...\"'"
    ),
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_a_wrong_override_is_one_line(load, override):
    assert mistakes(load, MINIMAL, override) == [WRONG_OVERRIDES[override]]


def test_files_that_cannot_be_read_are_explained(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("output_dir: é".encode("latin-1"))
    for name, problem in {
        "missing.yaml": "No such file or directory",
        "": "Is a directory",
        "latin.yaml": "it is not UTF-8 text",
    }.items():
        with pytest.raises(UserError) as error:
            load_config(tmp_path / name)
        assert str(error.value) == f"config {tmp_path / name}: {problem}; give the path of a YAML file"


def test_several_mistakes_are_a_line_each(load):
    lines = mistakes(load, MINIMAL, "train.steps=0", "seed=x", "trian=1", "data.eval_fraction=1.5")
    said = sorted(line.split(": ", 1)[1] for line in lines)
    assert said == [
        "data.eval_fraction is 1.5; must be less than 1",
        "seed is 'x'; must be a whole number",
        "train.steps is 0; must be greater than 0",
        "unknown key 'trian'; did you mean 'train'?",
    ]


# The batch.


@pytest.mark.parametrize(
    ("section", "shards", "rows"),
    [
        ({"batch_size": 8}, 4, 8),
        ({"batch_size": 8, "grad_accum": 2}, 4, 4),
        ({"batch_size_per_device": 3}, 4, 12),
        ({"batch_size_per_device": 3, "grad_accum": 5}, 4, 12),
    ],
)
def test_rows_of_a_micro_batch(section, shards, rows):
    assert TrainSection(steps=1, **section).micro_batch_rows(shards) == rows


@pytest.mark.parametrize(("batch_size", "grad_accum", "shards"), [(6, 1, 4), (8, 3, 1), (8, 4, 4)])
def test_a_batch_that_cannot_be_shared_out_is_refused(batch_size, grad_accum, shards):
    assert math.lcm(batch_size, grad_accum * shards) != batch_size
    with pytest.raises(UserError) as error:
        TrainSection(steps=1, batch_size=batch_size, grad_accum=grad_accum).micro_batch_rows(shards)
    assert str(error.value) == (
        f"train.batch_size is {batch_size}; it must be a multiple of grad_accum ({grad_accum}) times the devices that "
        f"share the batch ({shards})"
    )


def test_text_that_looks_like_a_number_survives_a_round_trip(load, tmp_path):
    config = load(MINIMAL, 'output_dir="1e5"')
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
