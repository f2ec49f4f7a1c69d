"""Commands in the pages are ones that the programs take: verbs, flags, files, config keys and values."""

import configparser
import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser

from gemma_xla import cli
from gemma_xla.config_file import load_config
from tests.docs.pages import PAGES, ROOT, Command, commands, name

# What stands for any config, number, preset and slice.
STANDS_FOR = {
    "CONFIG": "recipes/configs/gemma-2b-pretrain-v5e-256.yaml",
    "N": "2",
    "NAME": "gemma-2b",
    "SLICE": "v5e-8",
}
RECIPES = ("recipes/pretrain.py", "recipes/finetune.py")
VERBS = ("plan", "export", "generate", "preview", "flops", "chips")
# Those that answer at once and read nothing: they are run.
FAST = ("flops", "chips")


def check(command: Command) -> None:
    """
    Raises:
        Exception: the program would not take the command, or prints something else than the page says.
    """
    program, *words = (STANDS_FOR.get(word, word) for word in command.words)
    # Which file systems can be opened depends on what is installed here.
    words = [re.sub(r"^(gs|s3):/", "", word) for word in words]
    if words:
        {"gemma-xla": gemma_xla, "accelerate": launch, "python": python, "make": make, "pip": pip}[program](words)
    if program == "gemma-xla" and words and words[0] in FAST and (words[1:] or command.output):
        assert command.output in (printed(words), None)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Programs end the process where they refuse something; here that is an error with what they say."""
    with contextlib.redirect_stderr(io.StringIO()) as said, mock.patch.dict(os.environ):
        try:
            yield
        except SystemExit as error:
            raise AssertionError(said.getvalue().strip().splitlines()[-1]) from error


def parse(parser: Callable, *args: Any) -> Any:
    """What a parser makes of its arguments: of our own command line no more than that, nothing is run."""
    with refusals(), mock.patch.object(cli, "_guarded"):
        return parser(*args)


def printed(words: list[str]) -> str:
    with refusals(), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(words)
    return out.getvalue().strip("\n")


def gemma_xla(words: list[str]) -> None:
    assert words[0] in VERBS, f"there is no verb {words[0]}"
    # A verb alone is named rather than run.
    if len(words) > 1 and not (words[1].startswith("-") and "--published" not in words):
        parse(cli.main, words)
    load(words)


def launch(words: list[str]) -> None:
    assert words[0] == "launch"
    options = words[1:]
    started = next((word for word in options if word.endswith(".py")), None)
    args = parse(launch_command_parser().parse_args, options if started else [*options, RECIPES[0]])
    if started:
        recipe(started, args.training_script_args)


def recipe(path: str, words: list[str]) -> None:
    assert path in RECIPES, f"there is no recipe {path}"
    # Without arguments it is named rather than run.
    if words:
        parse(cli.recipe, "", None, words)
        load(words)


def load(words: list[str]) -> None:
    """Read the config that a command names, with what it sets."""
    sets = [after for word, after in zip(words, words[1:], strict=False) if word == "--set"]
    paths = [word for word in words if word.endswith(".yaml")]
    for path in paths or [STANDS_FOR["CONFIG"]] * bool(sets):
        load_config(ROOT / path, sets)


def python(words: list[str]) -> None:
    if words[0] == "-m":
        assert words[1] in ("pytest", "venv", "tests.docs.update"), f"no module {words[1]}"
    elif words[0] in RECIPES:
        recipe(words[0], words[1:])
    else:
        script(ROOT / words[0], words[1:])


def script(path: Path, words: list[str]) -> None:
    assert path.is_file(), f"there is no {path}"
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag}"' in path.read_text(encoding="utf-8"), f"{path.name} has no {flag}"


def make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        assert "=" in word or word in targets, f"there is no target {word}"


def pip(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"(?:\.|gemma_xla)\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(setup["options.extras_require"]), extras


def wrong(found: list[Command]) -> list[str]:
    """What is wrong with commands, a line each."""
    lines = []
    for command in found:
        try:
            check(command)
        except Exception as error:  # noqa: BLE001 (whatever it is, with the command it belongs to)
            lines.append(f"{' '.join(command.words)} (line {command.line}): {type(error).__name__} {error}")
    return lines


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_in_pages_are_understood(page):
    assert wrong(commands(page)) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("gemma-xla plam CONFIG", "no verb plam"),
        ("gemma-xla plan CONFIG --topologie v5e-8 --toast", "unrecognized arguments"),
        ("gemma-xla plan recipes/configs/none.yaml", "none.yaml"),
        ("gemma-xla plan CONFIG --set train.stepz=3", "train.stepz"),
        ("gemma-xla flops gemma-3b", "no preset 'gemma-3b'"),
        ("accelerate launch recipes/train.py --config CONFIG", "no recipe recipes/train.py"),
        ("accelerate launch --num_processes=x recipes/pretrain.py --config CONFIG", "invalid int value"),
        ("accelerate launch recipes/pretrain.py --set train.steps=3", "required: --config"),
        ("accelerate launch recipes/pretrain.py --config CONFIG --set train.steps=0", "train.steps is 0"),
        ("python benchmarks/train_step.py --onlie xla", "no --onlie"),
        ("make coffee", "no target coffee"),
        ("pip install -e '.[devv]'", "devv"),
    ],
)
def test_a_stale_command_is_found(line, problem, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```sh\nX=1 {line}\n```\n")
    (only,) = wrong(commands(page))
    assert problem in only


def test_a_stale_output_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```console\n$ gemma-xla chips\n{printed(['chips'])}\n$ gemma-xla chips\nv5e: 1 TFLOP/s\n```\n")
    (only,) = wrong(commands(page))
    assert "v5e: 1 TFLOP/s" in only
