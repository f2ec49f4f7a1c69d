"""Whatever is wrong with what a run is given costs one line: no traceback, nothing changed, nothing left running."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from gemma_xla.cli import recipe
from gemma_xla.errors import UserError
from recipes.pretrain import main
from tests import runs
from tests.bad_input_cases import CASES, Case, Place
from tests.conftest import write_jsonl
from tests.test_resume import arguments, wait_for_steps

# Seconds that a case may take.
LIMIT = 10
AREAS = {case.area: case for case in reversed(CASES)}


@pytest.fixture(scope="module")
def short_run(tiny_config, tmp_path_factory) -> Path:
    """The folder of a run of two steps."""
    # What the processes below are forked from gets ready meanwhile.
    forkserver.ensure_running()
    folder = tmp_path_factory.mktemp("short") / "run"
    main(tiny_config(folder, "train.steps=2"))
    return folder


@pytest.fixture
def place(tiny_file, tmp_path, corpus, tokenizer_folder, short_run, monkeypatch) -> Iterator[Place]:
    # What commands set for their own process is taken back afterwards.
    for name, value in {"USE_TORCH_XLA": "0", "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1"}.items():
        monkeypatch.setenv(name, value)
    tiny_file(tmp_path / "run")
    with ExitStack() as undo:
        yield Place(tmp_path, corpus, tokenizer_folder, short_run, short_run / "export", monkeypatch, undo)


def command_line(case: Case, place: Place) -> list[str]:
    case.prepare(place)
    given = [place.filled(text) for text in case.overrides.split(" + ") if text]
    options = [text for text in given if text.startswith("--")]
    return [*arguments(place.folder / "run.yaml", *(text for text in given if text not in options)), *options]


def pattern(case: Case, place: Place) -> str:
    says = re.escape(place.filled(case.says)).replace(re.escape("..."), ".*")
    return rf"(config {re.escape(str(place.folder))}/run\.yaml(: |, ))?{says}"


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def running() -> set:
    return {*threading.enumerate(), *psutil.Process().children(recursive=True)}


def eventually(condition: Callable[[], bool], seconds: float = 3) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_table_is_complete():
    assert Counter(case.area for case in CASES) >= Counter(
        config=22, data=12, tokenizer=6, init_from=9, checkpoint=7, hub=3, disk=4, devices=4
    )
    names = [(case.area, case.name) for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}: {case.name[:60]}")
def test_bad_input(case, place, capfd):
    given = command_line(case, place)
    files, running_before = listing(place.folder), running()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop, limited(LIMIT):
        recipe("Pretrain.", main, given)
    said = capfd.readouterr()
    assert stop.value.code == 2, said.err
    assert "Traceback" not in said.err + said.out
    (line,) = said.err.strip().split("\n")
    assert re.match(f"error: {pattern(case, place)}", line), line
    assert re.search(r"; |did you mean|write it as|Choose between", line), f"no way out: {line}"
    assert len(line) < 1000
    assert listing(place.folder) == files
    assert eventually(lambda: running() <= running_before), running() - running_before


@pytest.mark.parametrize("area", AREAS)
def test_debug_shows_where_it_happened(area, place):
    case = AREAS[area]
    given = command_line(case, place)
    with pytest.raises(UserError) as error, limited(LIMIT):
        recipe("Pretrain.", main, [*given, "--debug"])
    assert re.match(pattern(case, place), str(error.value))
    assert len(error.traceback) > 3


# Ctrl-C.


def handles_signals(process) -> bool:
    """Whether a process has come so far that it catches SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1)


class Started:
    """A run in a process of its own."""

    def __init__(self, config: Path, *overrides: str) -> None:
        self.folder, self.log = config.with_suffix(""), config.with_name("log")
        self.given = arguments(config, *overrides)
        self.process = runs.start(self.given, self.log)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        assert eventually(lambda: not self.process.is_alive() or condition(), seconds=30)
        assert self.process.is_alive(), self.log.read_text()

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def ended(self) -> int:
        self.process.join(30)
        return self.process.exitcode

    def again(self) -> int:
        self.process = runs.start([*self.given, "--set", "log.sample_prompt=null"], self.log)
        return self.ended()


def at_the_start(run: Started) -> None:
    run.wait_for(lambda: handles_signals(run.process))


def in_a_tokenizer(run: Started) -> None:
    run.wait_for(lambda: run.log.exists() and "Training a tokenizer" in run.log.read_text())
    time.sleep(0.2)


def in_the_steps(run: Started) -> None:
    wait_for_steps(run.folder, 3, run.process)
    assert run.process.is_alive()


def in_the_export(run: Started) -> None:
    run.wait_for(lambda: (run.folder / ".export.partial").exists() or (run.folder / "export").exists())


@pytest.fixture(scope="module")
def long_text(tmp_path_factory) -> Path:
    """Text from which training a tokenizer takes a second or two."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(30_000)]
    texts = [" ".join(draw.choices(words, k=500)) for _ in range(500)]
    return write_jsonl(tmp_path_factory.mktemp("long") / "text.jsonl", texts)


TOKENIZER = [
    "train.steps=1",
    "data.train={long_text}",
    "data.tokenizer=null",
    "data.vocab_size=600",
    "model.overrides.vocab_size=600",
]
PHASES = {
    at_the_start: ["train.steps=1"],
    in_a_tokenizer: TOKENIZER,
    in_the_steps: ["train.steps=30"],
    # Large, to be there for a while; and after the export the sample keeps it busy.
    in_the_export: ["model.overrides.intermediate_size=8192", "train.steps=1", "log.sample_prompt=he was"],
}


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_ctrl_c_is_a_clean_end(phase, tiny_file, tmp_path, long_text):
    overrides = [text.replace("{long_text}", str(long_text)) for text in PHASES[phase]]
    run = Started(tiny_file(tmp_path / "run"), *overrides)
    phase(run)
    run.interrupt()
    code = run.ended()
    log = run.log.read_text()
    assert code == 130, log
    assert "Traceback" not in log
    assert log.rstrip().endswith("interrupted by SIGINT")
    assert [*tmp_path.rglob(".*")] == []
    for checkpoint in run.folder.glob("checkpoints/step-*"):
        assert json.loads((checkpoint / "state.json").read_text())["step"]
    if (run.folder / "export").exists():
        assert (run.folder / "export" / "config.json").exists()
    assert run.again() == 0, run.log.read_text()
    assert (run.folder / "export" / "config.json").exists()


def test_a_second_ctrl_c_ends_at_once(tiny_file, tmp_path, long_text):
    overrides = [text.replace("{long_text}", str(long_text)) for text in TOKENIZER]
    run = Started(tiny_file(tmp_path / "run"), *overrides)
    in_a_tokenizer(run)
    for _ in range(2):
        with suppress(ProcessLookupError):  # one may have been enough
            run.interrupt()
        time.sleep(0.1)
    assert run.ended() == 130
    assert "Traceback" not in run.log.read_text()
