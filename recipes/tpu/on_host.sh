#!/usr/bin/env bash
# On a TPU VM: what tpu.sh has every host do. The run is a service of systemd, so that it outlives the connection, and
# is told to save when the machine is taken back.
#
#   on_host.sh install [SECRET]   into .venv; the secret is a Hugging Face token in Secret Manager
#   on_host.sh start RECIPE ARGUMENT...
#   on_host.sh state              running, finished, failed or absent
#   on_host.sh logs [--follow]
#   on_host.sh stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

service=gemma-xla
# How long a run that is told to end may take to save.
patience=300

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

do_install() {
  local python=python3 secret=${1:-}
  if ! [[ -x .venv/bin/python ]]; then
    # The machine's own Python is older than what PyTorch/XLA needs.
    "$python" -m pip install --quiet --user uv
    "$python" -m uv venv --quiet --seed --python 3.11 .venv
  fi
  .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[tpu]'
  if [[ -n $secret ]]; then
    local token=${HF_HOME:-$HOME/.cache/huggingface}/token
    mkdir -p "$(dirname "$token")"
    (umask 077 && gcloud secrets versions access latest "--secret=$secret" >"$token")
  fi
}

do_start() {
  (($#)) || die "start: name a recipe and its arguments"
  [[ -x .venv/bin/accelerate ]] || die "nothing is installed here; run tpu.sh install"
  [[ $(do_state) != running ]] || die "a run is under way; tpu.sh stop ends it"
  sudo systemctl stop "$service" 2>/dev/null || true
  sudo systemctl reset-failed "$service" 2>/dev/null || true
  # It stays, ended or not, until the next start: so `state` can tell what became of it. A TPU's driver locks memory, of
  # which services may lock little unless told otherwise.
  sudo systemd-run "--unit=$service" "--uid=$(id -u)" "--gid=$(id -g)" "--working-directory=$PWD" \
    --property=RemainAfterExit=yes "--property=TimeoutStopSec=$patience" \
    --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \
    "--setenv=HOME=$HOME" --setenv=PJRT_DEVICE=TPU -- "$PWD/.venv/bin/accelerate" launch "$@"
}

do_state() {
  local state
  state=$(systemctl show "$service" --property=ActiveState,SubState --value | paste -sd ' ')
  case $state in
    'active running' | activating* | deactivating*) echo running ;;
    'active exited') echo finished ;;
    failed*) echo failed ;;
    *) echo absent ;;
  esac
}

do_logs() {
  sudo journalctl "--unit=$service" --output=cat --lines=100 "$@"
}

do_stop() {
  sudo systemctl stop "$service"
}

verb=${1:-}
case $verb in
  install | start | state | logs | stop) "do_$verb" "${@:2}" ;;
  *) die "on_host.sh has no '$verb'; there are install, start, state, logs and stop" ;;
esac
