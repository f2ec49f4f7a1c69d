"""recipes/tpu: what its scripts would do, to the letter; manifests that Kubernetes takes; figures of the catalogue.

No cloud is asked: gcloud, kubectl and the rest are stand-ins that note how they were called, and scripts see no others.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from gemma_xla.chips import _SHAPES, CHIPS, cost, topology
from gemma_xla.config_file import load_config
from gemma_xla.interrupts import PREEMPTED
from gemma_xla.plan.slices import hardware

ROOT = Path(__file__).parents[1]
TPU = ROOT / "recipes" / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
BIN = Path(sys.executable).parent
KUBERNETES = "1.34"
CONFIG = "recipes/configs/gemma-2b-pretrain-v5e-256.yaml"

VALUES = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "NAME": "gemma",
    "TOPOLOGY": "v5e-256",
    "SLICES": "1",
    "SPOT": "no",
    "RECIPE": "recipes/pretrain.py",
    "CONFIG": CONFIG,
    "OUTPUT_DIR": "gs://bucket/runs/gemma",
    "QUEUED": "yes",
    "CLUSTER": "my-cluster",
    "LOCATION": "us-west4",
    "IMAGE": "us-docker.pkg.dev/my-project/images/gemma-xla:1",
}
TRAIN = ["recipes/pretrain.py", "--config", CONFIG, "--set", "output_dir=gs://bucket/runs/gemma"]
ONE_SLICE = [*TRAIN, "--set", "mesh.data=1", "--set", "mesh.fsdp=256"]
WHERE = ["--project=my-project", "--zone=us-west4-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
TPU_VM = ["gcloud", "compute", "tpus", "tpu-vm"]
ON_HOST = "bash gemma_xla/recipes/tpu/on_host.sh"
ALL = ["--node=all", "--worker=all"]

# Notes its own call; answers the first text that the call holds, each time with the next of what is between "|".
STAND_IN = """#!/bin/bash
name=${0##*/} answers=$STAND_INS/${0##*/}.answers
{ printf '%q ' "$name" "$@"; echo; } >>"$STAND_INS/calls"
[[ -e $answers ]] || exit 0
while IFS=$'\\t' read -r text code answer; do
  if [[ " $* " == *"$text"* ]]; then
    IFS='|' read -ra parts <<<"$answer"
    used=$STAND_INS/$name.${text//\\//_} number=0
    [[ ! -e $used ]] || number=$(<"$used")
    echo $((number + 1)) >"$used"
    ((number < ${#parts[@]})) || number=$((${#parts[@]} - 1))
    ((number < 0)) || printf '%b\\n' "${parts[number]}"
    exit "$code"
  fi
done <"$answers"
"""
# What else the scripts may call.
BASICS = ("bash", "cat", "cp", "dirname", "id", "mkdir", "mktemp", "paste", "rm", "sed", "touch")


class Tools:
    """Stand-ins for the programs that the scripts call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in BASICS:
            (self.bin / name).symlink_to(shutil.which(name))
        for name in ("gcloud", "kubectl", "docker", "sudo", "systemctl", "git", "sleep", "python3"):
            self.add(self.bin / name)
        self.environment = {"PATH": str(self.bin), "STAND_INS": str(folder), "HOME": str(folder)}

    def add(self, path: Path) -> None:
        """Make a stand-in."""
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def answer(self, name: str, *answers: tuple[str, int, str]) -> None:
        """Have a program answer calls that hold a text with an exit code and, call by call, the parts between "|"."""
        lines = ["\t".join((text, str(code), answer)) + "\n" for text, code, answer in answers]
        (self.folder / f"{name}.answers").write_text("".join(lines))

    @property
    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []

    def run(self, script: str, *arguments: str, answer: str = "", **values: str) -> subprocess.CompletedProcess:
        """Run a script with settings; other keywords are values of settings.env."""
        settings = self.folder / "settings.env"
        text = (TPU / "settings.env").read_text()
        for name, value in (VALUES | values).items():
            text, found = re.subn(rf"^{name}=.*$", lambda _, n=name, v=value: f"{n}={v}", text, flags=re.MULTILINE)
            assert found == 1, name
        settings.write_text(text)
        return subprocess.run(
            ["bash", str(TPU / script), *arguments, "--settings", str(settings)],
            capture_output=True,
            text=True,
            input=answer,
            cwd=self.folder,
            timeout=60,
            env=self.environment,
        )


@pytest.fixture
def tools(tmp_path) -> Tools:
    return Tools(tmp_path)


def dry(tools: Tools, script: str, *arguments: str, **values: str) -> list[list[str]]:
    """What a script would run: each command, as the shell would read it."""
    done = tools.run(script, *arguments, "--dry-run", **values)
    assert (done.returncode, tools.calls) == (0, [call for call in tools.calls if call[0] == "git"]), done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def refused(tools: Tools, script: str, *arguments: str, **values: str) -> str:
    """The one line with which a script refuses; it has called nothing."""
    done = tools.run(script, *arguments, **values)
    assert (done.returncode, done.stdout, tools.calls) == (2, "", [])
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").rstrip("\n")


# The scripts as text.


@pytest.mark.parametrize("script", [*SCRIPTS, TPU / "settings.env"], ids=lambda path: path.name)
def test_scripts_are_sound(script):
    command = [BIN / "shellcheck", "--shell=bash", "--external-sources", script.relative_to(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if script.suffix == ".sh":
        assert os.access(script, os.X_OK)
        assert "set -euo pipefail" in script.read_text() or "/common.sh" in script.read_text()


@pytest.mark.parametrize("script", ["tpu.sh", "spot.sh", "gke.sh"])
def test_help_names_every_verb(tools, script):
    done = tools.run(script, "--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout and "shellcheck" not in done.stdout
    verbs = re.findall(r"^do_(\w+)\(\)", (TPU / script).read_text(), re.MULTILINE)
    for verb in verbs:
        assert f"{script} {verb} " in done.stdout
    message = refused(tools, script, "nonsense") if verbs else ""
    assert all(verb in message for verb in verbs)


def test_the_dockerfile_is_sound():
    done = subprocess.run([BIN / "hadolint", TPU / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    lines = (TPU / "Dockerfile").read_text().splitlines()
    assert "USER 1000" in lines
    # All that is copied is in the context, and nothing else is.
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert lines[-2:] == ['ENTRYPOINT ["entrypoint.sh"]', 'CMD ["recipes/pretrain.py", "--help"]']
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert copied == allowed and all((ROOT / name).exists() for name in allowed)
    assert "*" in ignored and "recipes/tpu" in ignored


def test_the_container_is_the_recipe(tools):
    """Signals and exit codes are those of the recipe: it has the first process's number."""
    (tools.bin / "python").write_text('#!/bin/bash\necho "$PARENT $$ $*"\nexit 75\n')
    (tools.bin / "python").chmod(0o755)
    command = f'PARENT=$$ exec bash {TPU}/entrypoint.sh recipes/pretrain.py --config "a b"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=tools.environment)
    parent, process, *arguments = done.stdout.split(maxsplit=2)
    assert parent == process and arguments == ["recipes/pretrain.py --config a b\n"]
    assert (done.returncode, done.stderr) == (75, "")
    # Where not enough memory may be locked, it says so, and tries.
    allowed = subprocess.run(["bash", "-c", "ulimit -l 68719476736"], capture_output=True).returncode == 0
    on_tpu = tools.environment | {"PJRT_DEVICE": "TPU"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=on_tpu)
    assert done.returncode == 75
    assert ("kB of memory can be locked" in done.stderr) != allowed


# TPU VMs.


def test_one_slice_from_the_queue(tools):
    assert dry(tools, "tpu.sh", "create") == [
        [*QUEUED, "create", "gemma", *WHERE, "--accelerator-type=v5litepod-256"]
        + ["--runtime-version=v2-alpha-tpuv5-lite", "--node-id=gemma"]
    ]
    assert dry(tools, "tpu.sh", "wait") == [[*QUEUED, "describe", "gemma", *WHERE, "--format=value(state.state)"]]
    assert dry(tools, "tpu.sh", "run") == [
        [*QUEUED, "ssh", "gemma", *WHERE, *ALL, f"--command={ON_HOST} start {shlex.join(ONE_SLICE)}"]
    ]
    assert dry(tools, "tpu.sh", "state") == [
        [*QUEUED, "describe", "gemma", *WHERE],
        [*QUEUED, "ssh", "gemma", *WHERE, *ALL, f"--command={ON_HOST} state"],
    ]
    follow = f"--command={ON_HOST} logs --follow"
    assert dry(tools, "tpu.sh", "logs") == [[*QUEUED, "ssh", "gemma", *WHERE, "--node=0", "--worker=0", follow]]
    assert dry(tools, "tpu.sh", "logs", "7") == [[*QUEUED, "ssh", "gemma", *WHERE, "--node=0", "--worker=7", follow]]
    logs = "runs/tpu-logs/gemma"
    assert dry(tools, "tpu.sh", "logs", "all") == [
        ["mkdir", "-p", logs],
        [*QUEUED, "ssh", "gemma", *WHERE, *ALL, f"--command={ON_HOST} logs", f"--output-directory={logs}"],
    ]
    assert dry(tools, "tpu.sh", "stop") == [[*QUEUED, "ssh", "gemma", *WHERE, *ALL, f"--command={ON_HOST} stop"]]
    assert dry(tools, "tpu.sh", "delete") == [[*QUEUED, "delete", "gemma", *WHERE, "--quiet", "--force"]]


def test_one_slice_at_once(tools):
    once = {"QUEUED": "no", "SPOT": "yes", "TOPOLOGY": "v5p-128", "SERVICE_ACCOUNT": "sa@my-project.iam"}
    assert dry(tools, "tpu.sh", "create", **once) == [
        [*TPU_VM, "create", "gemma", *WHERE, "--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5", "--spot"]
        + ["--service-account=sa@my-project.iam"]
    ]
    assert dry(tools, "tpu.sh", "wait", **once) == [[*TPU_VM, "describe", "gemma", *WHERE, "--format=value(state)"]]
    start = shlex.join([*TRAIN, "--set", "mesh.data=1", "--set", "mesh.fsdp=64"])
    assert dry(tools, "tpu.sh", "run", **once) == [
        [*TPU_VM, "ssh", "gemma", *WHERE, "--worker=all", f"--command={ON_HOST} start {start}"]
    ]
    assert dry(tools, "tpu.sh", "delete", **once) == [[*TPU_VM, "delete", "gemma", *WHERE, "--quiet"]]


def test_several_slices(tools):
    several = {"SLICES": "2", "SPOT": "yes"}
    (create,) = dry(tools, "tpu.sh", "create", **several)
    assert create[-3:] == ["--node-count=2", "--node-prefix=gemma", "--spot"]
    (start,) = dry(tools, "tpu.sh", "run", **several)
    assert start[-1].endswith("--set mesh.data=2 --set mesh.fsdp=256")
    (logs,) = dry(tools, "tpu.sh", "logs", "3", "1", **several)
    assert {"--node=1", "--worker=3"} <= set(logs)


def test_install_copies_what_is_committed(tools):
    archive, copy, install = dry(tools, "tpu.sh", "install", HF_TOKEN_SECRET="my-token")
    assert archive[:5] == ["git", "-C", str(ROOT), "archive", "--format=tar.gz"] and archive[-1] == "HEAD"
    file = archive[5].removeprefix("--output=")
    assert copy == [*QUEUED, "scp", file, "gemma:gemma_xla.tar.gz", *WHERE, "--worker=all", "--node=all"]
    unpack = "mkdir -p gemma_xla && tar -xzf gemma_xla.tar.gz -C gemma_xla"
    assert install == [*QUEUED, "ssh", "gemma", *WHERE, *ALL, f"--command={unpack} && {ON_HOST} install my-token"]
    assert not Path(file).parent.exists()


AWKWARD = ["data.train={path: 'gs://b/*.jsonl', streaming: true}", 'log.sample_prompt="a\\b" $(touch {bad}) `x` & <']


def test_changes_of_the_config_reach_the_hosts_as_they_are(tools, tmp_path):
    changes = [change.replace("{bad}", str(tmp_path / "bad")) for change in AWKWARD]
    (start,) = dry(tools, "tpu.sh", "run", SET=f"({' '.join(map(shlex.quote, changes))})")
    # Through the shell of the host, as ssh does it.
    line = start[-1].removeprefix("--command=").replace(ON_HOST, "printf '%s\\n'", 1)
    seen = subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout.splitlines()
    assert seen == ["start", *ONE_SLICE, "--set", changes[0], "--set", changes[1]]
    assert not (tmp_path / "bad").exists()


def test_what_is_run_is_what_was_shown(tools):
    shown = dry(tools, "tpu.sh", "create")
    done = tools.run("tpu.sh", "create", "--yes")
    assert (done.returncode, tools.calls) == (0, shown)
    assert shlex.split(done.stderr) == ["+", *shown[0]]


@pytest.mark.parametrize("verb", ["create", "delete"])
@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh"])
def test_what_costs_or_destroys_is_asked_for(tools, script, verb):
    verb = {"create": "pools"}.get(verb, verb) if script == "gke.sh" else verb
    for answer in ("", "\n", "yes\n", "gemm\n"):
        done = tools.run(script, verb, answer=answer)
        assert (done.returncode, tools.calls) == (2, [])
        assert "256 chips" in done.stderr and "nothing was done" in done.stderr
    assert tools.run(script, verb, answer="gemma\n").returncode == 0
    assert tools.calls


def test_waiting(tools):
    tools.answer("gcloud", ("describe", 0, "ACCEPTED|WAITING_FOR_RESOURCES|PROVISIONING|ACTIVE"))
    assert tools.run("tpu.sh", "wait").returncode == 0
    assert [call[0] for call in tools.calls] == ["gcloud", "sleep"] * 3 + ["gcloud"]


@pytest.mark.parametrize(("state", "code"), [("FAILED", 0), ("SUSPENDED", 0), ("", 1)])
def test_waiting_for_what_will_not_come(tools, state, code):
    tools.answer("gcloud", ("describe", code, state))
    done = tools.run("tpu.sh", "wait")
    assert done.returncode == 2
    assert f"error: gemma is {state or 'not there'}, and will not become ACTIVE; see tpu.sh state" in done.stderr


# A run on slices that come and go.


def spot(tools: Tools, states: str, host: str, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run spot.sh while Google and the first host say these things, one after the other; return what it did."""
    tools.answer("gcloud", ("value(state.state)", 0, states), ("--worker=0", 0, host))
    done = tools.run("spot.sh", *arguments, "--yes", SPOT="yes")
    verbs = [" ".join(call[4:]) for call in tools.calls if call[0] == "gcloud"]
    names = {"create": "create", "scp": "install", " start ": "run", "logs": "logs", "delete": "delete"}
    return done, [name for verb in verbs for part, name in names.items() if part in verb and "value(" not in verb]


LIFE = ["create", "install", "run"]


def test_a_run_that_ends_gives_its_slice_back(tools):
    done, did = spot(tools, "WAITING_FOR_RESOURCES|ACTIVE", "running|running|finished")
    assert (done.returncode, did) == (0, [*LIFE, "logs", "delete"])
    assert "Finished: gs://bucket/runs/gemma" in done.stderr


def test_a_run_whose_slice_is_taken_goes_on_with_another(tools):
    done, did = spot(tools, "ACTIVE|ACTIVE|SUSPENDED|ACTIVE|ACTIVE|ACTIVE", "running|running|finished")
    assert (done.returncode, did) == (0, [*LIFE, "delete", *LIFE, "logs", "delete"])


def test_a_slice_that_is_taken_before_it_is_ready(tools):
    done, did = spot(tools, "PROVISIONING|SUSPENDED|ACTIVE", "finished")
    assert (done.returncode, did) == (0, ["create", "delete", *LIFE, "logs", "delete"])


def test_a_run_that_fails_is_not_started_again(tools):
    done, did = spot(tools, "ACTIVE", "running|failed")
    assert (done.returncode, did) == (2, [*LIFE, "logs", "delete"])
    assert "the run failed; its hosts' logs are in" in done.stderr


def test_lives_come_to_an_end(tools):
    done, did = spot(tools, "SUSPENDED", "running", "3")
    assert (done.returncode, did) == (2, ["create", "delete"] * 3)
    assert "taken away 3 times" in done.stderr


def test_a_host_that_was_restarted_gets_its_run_again(tools):
    done, did = spot(tools, "ACTIVE", "running|absent|finished")
    assert (done.returncode, did) == (0, [*LIFE, "run", "logs", "delete"])


def test_one_life_dry(tools):
    steps = [["create"], ["wait"], ["install"], ["run"], ["state"], ["logs", "all"], ["delete"]]
    expected = [command for step in steps for command in dry(tools, "tpu.sh", *step, SPOT="yes")]
    found = dry(tools, "spot.sh", SPOT="yes")

    def steady(commands: list[list[str]]) -> list[list[str]]:
        return [[re.sub(r"/[^ =]*/gemma_xla.tar.gz", "ARCHIVE", part) for part in command] for command in commands]

    assert steady(found) == steady(expected)


# On a host.


class Host:
    """A checkout with an environment, and on_host.sh in it."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.root = tools.folder / "gemma_xla"
        self.script = self.root / "recipes" / "tpu" / "on_host.sh"
        self.script.parent.mkdir(parents=True)
        self.script.write_text((TPU / "on_host.sh").read_text())

    def with_environment(self) -> Host:
        for name in ("python", "accelerate"):
            file = self.root / ".venv" / "bin" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            self.tools.add(file)
        return self

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", self.script, *arguments], capture_output=True, text=True, env=self.tools.environment
        )


def test_a_run_is_a_service(tools):
    host = Host(tools).with_environment()
    tools.answer("systemctl", ("show", 0, r"inactive\ndead"))
    done = host.run("start", *ONE_SLICE)
    assert done.returncode == 0, done.stderr
    launched = tools.calls[-1]
    assert launched[:3] == ["sudo", "systemd-run", "--unit=gemma-xla"]
    assert f"--uid={os.getuid()}" in launched and f"--working-directory={host.root}" in launched
    limits = {"--property=TimeoutStopSec=300", "--property=LimitMEMLOCK=infinity"}
    assert {"--setenv=PJRT_DEVICE=TPU", *limits} <= set(launched)
    start = launched.index("--")
    assert launched[start:] == ["--", f"{host.root}/.venv/bin/accelerate", "launch", *ONE_SLICE]


def test_a_run_is_not_started_twice_nor_before_it_is_installed(tools):
    host = Host(tools)
    assert "run tpu.sh install" in host.run("start", *ONE_SLICE).stderr
    tools.answer("systemctl", ("show", 0, r"active\nrunning"))
    done = host.with_environment().run("start", *ONE_SLICE)
    assert (done.returncode, done.stderr) == (2, "error: a run is under way; tpu.sh stop ends it\n")
    assert not any("systemd-run" in call for call in tools.calls)


@pytest.mark.parametrize(
    ("service", "state"),
    [
        (r"active\nrunning", "running"),
        (r"deactivating\nstop-sigterm", "running"),
        (r"active\nexited", "finished"),
        (r"failed\nfailed", "failed"),
        (r"inactive\ndead", "absent"),
    ],
)
def test_the_state_of_a_run(tools, service, state):
    tools.answer("systemctl", ("show", 0, service))
    assert Host(tools).run("state").stdout == f"{state}\n"


def test_logs_and_stop(tools):
    host = Host(tools)
    host.run("logs", "--follow")
    host.run("stop")
    journal = ["sudo", "journalctl", "--unit=gemma-xla", "--output=cat", "--lines=100", "--follow"]
    assert tools.calls == [journal, ["sudo", "systemctl", "stop", "gemma-xla"]]


def test_install_keeps_to_the_tested_versions(tools):
    host = Host(tools).with_environment()
    tools.answer("gcloud", ("--secret=my-token", 0, "hf_secret"))
    assert host.run("install", "my-token").returncode == 0
    install, secret = tools.calls
    assert install[1:] == ["-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[tpu]"]
    assert secret == ["gcloud", "secrets", "versions", "access", "latest", "--secret=my-token"]
    token = tools.folder / ".cache" / "huggingface" / "token"
    assert token.read_text() == "hf_secret\n" and token.stat().st_mode & 0o077 == 0
    # The words that name it are no secret; the token itself is in no command line.
    assert not any("hf_secret" in part for call in tools.calls for part in call)


# Kubernetes.


def manifest(tools: Tools, *arguments: str, **values: str) -> dict:
    done = tools.run("gke.sh", *(arguments or ("render",)), **values)
    assert done.returncode == 0, done.stderr
    assert "${" not in done.stdout
    return yaml.safe_load(done.stdout)


def _object(required: list[str], **properties: dict) -> dict:
    """A JSON schema of an object with these fields alone."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
_COUNT = {"type": "integer", "minimum": 0}
_TRUTH = {"type": "boolean"}
_RULE = _object(
    ["action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={
        "type": "array",
        "items": {
            "enum": ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"]
            + ["MaxFailedIndexesExceeded", "PodFailurePolicy"]
        },
    },
    targetReplicatedJobs={"type": "array", "items": _NAME},
)
# The fields of jobset.x-k8s.io/v1alpha2 (https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/) that one sets by
# hand; the template of its jobs is checked against Kubernetes' own schema.
JOBSET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(["name"], name=_NAME, namespace=_NAME, annotations={"type": "object"}, labels={"type": "object"}),
    spec=_object(
        ["replicatedJobs"],
        network=_object([], enableDNSHostnames=_TRUTH, subdomain=_NAME, publishNotReadyAddresses=_TRUTH),
        failurePolicy=_object([], maxRestarts=_COUNT, rules={"type": "array", "maxItems": 20, "items": _RULE}),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["name", "template"], name=_NAME, groupName=_NAME, replicas=_COUNT, template={"type": "object"}
            ),
        },
        suspend=_TRUTH,
        ttlSecondsAfterFinished=_COUNT,
    ),
)


def check(jobset: dict) -> dict:
    """Check a JobSet; return the spec of its jobs."""
    jsonschema.validate(jobset, JOBSET)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **replicated["template"]}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    # A pod's host name, <jobset>-<job>-<slice>-<host> and five letters more, is at most 63 letters long.
    longest = f"{jobset['metadata']['name']}-{replicated['name']}-{replicated['replicas']}-{job['spec']['completions']}"
    assert len(longest) + 6 <= 63
    return job["spec"]


@pytest.mark.parametrize("values", [{}, {"SLICES": "4", "SPOT": "yes"}, {"TOPOLOGY": "v5p-128", "RUN_AS_USER": "1000"}])
def test_the_manifest_is_one_that_kubernetes_takes(tools, values):
    job = check(manifest(tools, **values, NAME="a" * 39))
    pod = job["template"]["spec"]
    slice_ = topology(values.get("TOPOLOGY", "v5e-256"))
    assert job["parallelism"] == job["completions"] == slice_.num_hosts
    (train,) = pod["containers"]
    tpus = train["resources"]["limits"]["google.com/tpu"]
    assert tpus == train["resources"]["requests"]["google.com/tpu"]
    assert tpus * job["completions"] == slice_.num_chips
    selector = pod["nodeSelector"]
    assert math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))) == slice_.num_chips
    assert ("cloud.google.com/gke-spot" in selector) == (values.get("SPOT") == "yes")
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert pod["securityContext"]["runAsUser"] == int(values.get("RUN_AS_USER", "0"))
    rights = {"allowPrivilegeEscalation": False, "capabilities": {"add": ["SYS_RESOURCE"]}}
    assert train["securityContext"] == rights


def test_the_schemas_refuse_what_is_wrong(tools):
    wrong = manifest(tools)
    wrong["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    with pytest.raises(jsonschema.ValidationError, match="'Fail' is not one of"):
        check(wrong)
    wrong = manifest(tools)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodeselector"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeselector"):
        check(wrong)


def test_only_what_may_pass_is_started_again(tools):
    """Exit codes as docs/checkpoints.md has them: mistakes end the JobSet, all else restarts it as a whole."""
    jobset = manifest(tools)
    job = check(jobset)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    codes = dict(re.findall(r"^\| ([^|]+) \| (\d+) \|", (ROOT / "docs/checkpoints.md").read_text(), re.MULTILINE))
    lasting = {int(code) for what, code in codes.items() if "mistake" in what or "no longer a number" in what}
    assert set(rule["onExitCodes"]["values"]) == lasting
    assert PREEMPTED not in lasting
    # FailJob is what gives a job this reason; without it one failed pod fails the job for another.
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["rules"][0]["action"] == "FailJobSet" and policy["maxRestarts"] == 100
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_the_run_of_the_manifest_would_start(tools, slices):
    """Its arguments are those of a recipe; the config they lead to fits the devices that the manifest asks for."""
    jobset = manifest(tools, SLICES=str(slices))
    job = check(jobset)
    (train,) = job["template"]["spec"]["containers"]
    recipe, option, config, *overrides = train["args"]
    assert (ROOT / recipe).exists() and option == "--config" and set(overrides[::2]) == {"--set"}
    loaded = load_config(ROOT / config, overrides[1::2])
    assert loaded.output_dir == "gs://bucket/runs/gemma" and loaded.checkpoint.resume == "auto"
    found = hardware(loaded, f"{slices}xv5e-256")
    assert (found.mesh.data, found.slice_mesh.data, found.slice_mesh.fsdp) == (slices, 1, 256)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == found.count
    assert loaded.train.micro_batch_rows(found.mesh.batch_shards) % found.num_hosts == 0
    # With fewer devices than these it is refused, rather than each slice training alone.
    assert (loaded.mesh.data, loaded.mesh.fsdp) == (slices, 256)


def test_changes_of_the_config_reach_the_pods_as_they_are(tools):
    changes = [*AWKWARD, "log.sample_prompt=${IMAGE}"]
    done = tools.run("gke.sh", "render", SET=f"({' '.join(map(shlex.quote, changes[:2]))})")
    (train,) = check(yaml.safe_load(done.stdout))["template"]["spec"]["containers"]
    assert train["args"] == [*ONE_SLICE, "--set", changes[0], "--set", changes[1]]


def test_the_cluster(tools):
    place = ["--project=my-project", "--cluster=my-cluster", "--location=us-west4"]
    pools = [*("gcloud", "container", "node-pools")]
    machines = ["--machine-type=ct5lp-hightpu-4t", "--num-nodes=64", "--tpu-topology=16x16", "--spot"]
    values = {"SLICES": "2", "SPOT": "yes"}
    assert dry(tools, "gke.sh", "pools", **values) == [
        [*pools, "create", f"gemma-{i}", *place, *machines] for i in range(2)
    ]
    assert dry(tools, "gke.sh", "delete", **values) == [
        [*pools, "delete", f"gemma-{i}", *place, "--quiet"] for i in range(2)
    ]
    one_host = {"TOPOLOGY": "v6e-8"}
    assert dry(tools, "gke.sh", "pools", **one_host) == [
        [*pools, "create", "gemma-0", *place, "--machine-type=ct6e-standard-8t", "--num-nodes=1"]
    ]
    image = VALUES["IMAGE"]
    assert dry(tools, "gke.sh", "image") == [
        ["docker", "build", f"--file={TPU}/Dockerfile", f"--tag={image}", str(ROOT)],
        ["docker", "push", image],
    ]


def test_the_run_on_the_cluster(tools):
    at, run = "--namespace=default", "--selector=jobset.sigs.k8s.io/jobset-name=gemma"
    assert dry(tools, "gke.sh", "state") == [
        ["kubectl", "get", "jobset", "gemma", at, "--output=wide"],
        ["kubectl", "get", "pods", at, run, "--output=wide"],
    ]
    pod = f"{run},jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=3"
    assert dry(tools, "gke.sh", "logs", "3", "1", SLICES="2") == [
        ["kubectl", "logs", at, pod, "--follow", "--tail=100"]
    ]
    assert dry(tools, "gke.sh", "logs", "all", SLICES="2") == [
        ["kubectl", "logs", at, run, "--prefix", "--tail=50", "--max-log-requests=128"]
    ]
    assert dry(tools, "gke.sh", "stop") == [["kubectl", "delete", "jobset", "gemma", at]]
    ((kubectl, verb, file),) = dry(tools, "gke.sh", "apply")
    assert (kubectl, verb) == ("kubectl", "apply")
    assert not Path(file.removeprefix("--filename=")).exists()


def test_tensorboard(tools, tmp_path):
    apply, wait, forward = dry(tools, "gke.sh", "tensorboard")
    assert apply[:2] == ["kubectl", "apply"]
    assert wait == ["kubectl", "rollout", "status", "deployment/gemma-tensorboard", "--namespace=default"]
    assert forward[:3] == ["kubectl", "port-forward", "deployment/gemma-tensorboard"]
    # What is applied, as kubectl sees it.
    (tools.bin / "kubectl").write_text(f'#!/bin/bash\n[[ $1 == apply ]] && cp "${{2#*=}}" {tmp_path}/applied.yaml\n:\n')
    assert tools.run("gke.sh", "tensorboard").returncode == 0
    deployment = yaml.safe_load((tmp_path / "applied.yaml").read_text())
    kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["args"][0] == "--logdir=gs://bucket/runs/gemma/tensorboard"
    assert "google.com/tpu" not in json.dumps(deployment)


# Values that are missing or wrong.


@pytest.mark.parametrize(
    ("script", "verb", "name"),
    [
        *(("tpu.sh", "create", name) for name in ("PROJECT", "ZONE", "NAME", "TOPOLOGY", "RECIPE", "CONFIG")),
        ("tpu.sh", "run", "OUTPUT_DIR"),
        ("spot.sh", "", "ZONE"),
        *(("gke.sh", "pools", name) for name in ("PROJECT", "CLUSTER", "LOCATION")),
        *(("gke.sh", "apply", name) for name in ("IMAGE", "NAMESPACE", "KUBERNETES_SERVICE_ACCOUNT")),
    ],
)
def test_a_missing_value_is_named_with_the_way_out(tools, script, verb, name):
    message = refused(tools, script, *filter(None, [verb]), **{name: ""})
    assert re.match(rf"{name} is empty in \S+/settings.env; set it to \w.{{8,}}", message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"TOPOLOGY": "v5e-7"}, "TOPOLOGY is 'v5e-7' in .*; name a slice such as v5e-256"),
        ({"TOPOLOGY": "h100-8"}, "TOPOLOGY is 'h100-8' in .*; name a slice such as v5e-256"),
        ({"SLICES": "two"}, "SLICES is 'two' in .*; give a whole number from 1"),
        ({"SLICES": "0"}, "SLICES is '0' in .*; give a whole number from 1"),
        ({"SLICES": "2", "TOPOLOGY": "v5e-8"}, "TOPOLOGY is v5e-8 and SLICES is 2 .*; .*: take a larger slice"),
        ({"SLICES": "2", "QUEUED": "no"}, "SLICES is 2 and QUEUED is no .*: set QUEUED=yes"),
        ({"SPOT": "true"}, "SPOT is 'true' in .*; it must be one of: yes no"),
        ({"QUEUED": "1"}, "QUEUED is '1' in .*; it must be one of: yes no"),
        ({"NAME": "My_Run"}, "NAME is 'My_Run' in .*; use at most 39 lower-case letters"),
        ({"NAME": "a" * 40}, "NAME is 'a{40}' in .*; use at most 39"),
        ({"OUTPUT_DIR": "runs/gemma"}, "OUTPUT_DIR is 'runs/gemma' in .*; .* such as gs://my-bucket/runs/gemma"),
        ({"OUTPUT_DIR": "gs://bucket"}, "OUTPUT_DIR is 'gs://bucket' in .*; .* such as gs://my-bucket/runs/gemma"),
        ({"CONFIG": "none.yaml"}, "CONFIG is 'none.yaml' in .*; there is no such file in "),
        ({"RECIPE": "recipes/train.py"}, "RECIPE is 'recipes/train.py' in .*; there is no such file in "),
    ],
)
def test_a_wrong_value_is_named_with_the_way_out(tools, values, message):
    assert re.match(message, refused(tools, "tpu.sh", "create", **values))


def test_wrong_words_on_the_command_line(tools):
    assert refused(tools, "tpu.sh", "begin").startswith("tpu.sh has no 'begin'; there are create, wait, ")
    assert refused(tools, "tpu.sh", "run", "--dryrun").startswith("no option is called --dryrun; there are --dry-run, ")
    assert refused(tools, "spot.sh", "many").startswith("'many' is no number of lives; ")
    assert "MAX_RESTARTS is '-1'" in refused(tools, "gke.sh", "apply", MAX_RESTARTS="-1")


def test_a_program_that_is_not_installed(tools):
    (tools.bin / "gcloud").unlink()
    done = tools.run("tpu.sh", "state")
    assert done.stderr.startswith("error: gcloud is not installed; see https://cloud.google.com/")
    # To look at what would be done, it is not needed.
    assert dry(tools, "tpu.sh", "stop")


def test_as_it_comes_the_settings_ask_for_what_is_missing():
    """Fresh from the repository, the first thing said is what to fill in."""
    done = subprocess.run(["bash", TPU / "tpu.sh", "create"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: OUTPUT_DIR is empty in {TPU}/settings.env; set it")


# What the page says.


def test_the_page_names_what_there_is():
    page = (TPU / "README.md").read_text()
    used = re.findall(r"^recipes/tpu/(\w+\.sh) (\w+)", page, re.MULTILINE)
    for script in ("tpu.sh", "gke.sh"):
        verbs = set(re.findall(r"^do_(\w+)\(\)", (TPU / script).read_text(), re.MULTILINE))
        assert {verb for name, verb in used if name == script} | {"state"} == verbs
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert target.startswith("https://") or (TPU / target).exists(), target
    settings = set(re.findall(r"^([A-Z_]+)=", (TPU / "settings.env").read_text(), re.MULTILINE))
    others = {"MASTER_ADDR", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "MEGASCALE_", "SYS_RESOURCE", "SIGTERM"}
    assert set(re.findall(r"`([A-Z_]{3,})[=*`]", page)) <= settings | others


def test_costs_are_those_of_the_catalogue():
    rows = re.findall(r"^\| (two )?(v\w+-\d+) \| (\d+) \| ([\d.]+) \|$", (TPU / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 5
    for two, name, chips, dollars in rows:
        slice_ = topology(name)
        assert int(chips) == slice_.num_chips * (2 if two else 1)
        assert float(dollars) == pytest.approx(cost(slice_.chip, int(chips), 1))


# Beside the catalogue.

SLICES = [f"{chip}-{int(CHIPS[chip].cores.value) * math.prod(s)}" for chip, shapes in _SHAPES.items() for s in shapes]


def described(names: list[str]) -> list[dict[str, str]]:
    """What common.sh makes of the names of slices."""
    values = "chips hosts chips_per_host shape accelerator runtime gke_accelerator machine"
    show = f'for value in {values}; do printf "%s " "$value" "${{!value}}"; done; echo'
    script = f"source {TPU}/common.sh; for TOPOLOGY in {' '.join(names)}; do describe_topology; {show}; done"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [dict(zip(words[::2], words[1::2], strict=True)) for words in lines]


def test_slices_are_those_of_the_catalogue():
    for name, found in zip(SLICES, described(SLICES), strict=True):
        slice_ = topology(name)
        assert found["shape"] == "x".join(map(str, slice_.shape)), name
        assert (int(found["chips"]), int(found["hosts"])) == (slice_.num_chips, slice_.num_hosts), name
        assert int(found["chips_per_host"]) * int(found["hosts"]) == slice_.num_chips, name
        assert topology(found["accelerator"]).num_chips == slice_.num_chips, name
        assert found["machine"].endswith(f"-{found['chips_per_host']}t"), name
        kinds = {"v5e": ("v5-lite", "tpuv5-lite"), "v5p": ("v5p", "tpuv5"), "v6e": ("v6e", "tpuv6e")}[slice_.chip.name]
        assert found["gke_accelerator"].startswith(f"tpu-{kinds[0]}-"), name
        assert found["runtime"] == f"v2-alpha-{kinds[1]}", name
