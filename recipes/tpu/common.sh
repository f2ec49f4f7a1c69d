#!/usr/bin/env bash
# What the scripts beside it share; they source it. Needs bash 4.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
settings=$here/settings.env
dry_run=no
assume_yes=no
arguments=()

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the top of a script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse "$@": options that all scripts take; what remains is in `arguments`.
parse() {
  while (($#)); do
    case $1 in
      --dry-run) dry_run=yes ;;
      --yes) assume_yes=yes ;;
      --settings)
        (($# > 1)) || die "--settings: name a file, such as a copy of $settings"
        settings=$2
        shift
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      -*) die "no option is called $1; there are --dry-run, --yes, --settings FILE and --help" ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
}

# need NAME WHAT: refuse to go on without a value.
need() {
  [[ -n ${!1:-} ]] || die "$1 is empty in $settings; set it to $2"
}

need_program() {
  [[ $dry_run == yes ]] || command -v "$1" >/dev/null || die "$1 is not installed; $2"
}

one_of() { # NAME VALUE...
  local name=$1 value
  shift
  for value in "$@"; do
    [[ ${!name} != "$value" ]] || return 0
  done
  die "$name is '${!name}' in $settings; it must be one of: $*"
}

whole_number() { # NAME LEAST
  if ! [[ ${!1} =~ ^[0-9]+$ ]] || ((10#${!1} < $2)); then
    die "$1 is '${!1}' in $settings; give a whole number from $2"
  fi
}

load_settings() {
  [[ -r $settings ]] || die "$settings cannot be read; name the file with your values: --settings FILE"
  # shellcheck source=recipes/tpu/settings.env
  source "$settings"
  need NAME "a name for the run, such as gemma-2b"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$ ]] || die "NAME is '$NAME' in $settings; use at most 39 lower-case" \
    "letters, digits and dashes, a letter first"
  need TOPOLOGY "the name of a slice, such as v5e-256"
  need RECIPE "recipes/pretrain.py or recipes/finetune.py"
  need CONFIG "a config of recipes/configs, or one of your own in this repository"
  need OUTPUT_DIR "a folder in a bucket, such as gs://my-bucket/runs/$NAME"
  [[ $OUTPUT_DIR == gs://?*/?* ]] || die "OUTPUT_DIR is '$OUTPUT_DIR' in $settings; hosts share no disk, so it must be" \
    "a folder in a bucket, such as gs://my-bucket/runs/$NAME"
  local file
  for file in RECIPE CONFIG; do
    [[ -f $root/${!file} ]] || die "$file is '${!file}' in $settings; there is no such file in $root"
  done
  one_of SPOT yes no
  whole_number SLICES 1
  describe_topology
  ((SLICES == 1 || hosts > 1)) || die "TOPOLOGY is $TOPOLOGY and SLICES is $SLICES in $settings; several slices must" \
    "have several hosts each: take a larger slice"
  # Each slice holds the whole model; a run that finds other devices than these is refused at its start.
  train=("$RECIPE" --config "$CONFIG" --set "output_dir=$OUTPUT_DIR" --set "mesh.data=$SLICES" --set "mesh.fsdp=$chips")
  local change
  for change in ${SET[@]+"${SET[@]}"}; do
    train+=(--set "$change")
  done
}

# From TOPOLOGY: chips, hosts and chips_per_host of a slice, and what Cloud TPU and GKE call them.
# shellcheck disable=SC2034 # the scripts that source this use them
describe_topology() {
  local chip=${TOPOLOGY%%-*} number=${TOPOLOGY#*-} one_host=8
  accelerator=$TOPOLOGY
  case $chip in
    v5e)
      accelerator=v5litepod-$number runtime=v2-alpha-tpuv5-lite
      gke_accelerator=tpu-v5-lite-podslice machine=ct5lp-hightpu
      ;;
    v6e) runtime=v2-alpha-tpuv6e gke_accelerator=tpu-v6e-slice machine=ct6e-standard ;;
    v5p) runtime=v2-alpha-tpuv5 gke_accelerator=tpu-v5p-slice machine=ct5p-hightpu one_host=4 ;;
  esac
  # The number in a slice's name counts cores, of which a v5p has two per chip.
  case $chip-$number in
    v[56]e-1) shape=1x1 ;;
    v[56]e-4) shape=2x2 ;;
    v[56]e-8) shape=2x4 ;;
    v[56]e-16) shape=4x4 ;;
    v[56]e-32) shape=4x8 ;;
    v[56]e-64) shape=8x8 ;;
    v[56]e-128) shape=8x16 ;;
    v[56]e-256) shape=16x16 ;;
    v5p-8) shape=2x2x1 ;;
    v5p-16) shape=2x2x2 ;;
    v5p-32) shape=2x2x4 ;;
    v5p-64) shape=2x4x4 ;;
    v5p-128) shape=4x4x4 ;;
    v5p-256) shape=4x4x8 ;;
    v5p-512) shape=4x8x8 ;;
    v5p-1024) shape=8x8x8 ;;
    v5p-2048) shape=8x8x16 ;;
    v5p-4096) shape=8x16x16 ;;
    v5p-8192) shape=16x16x16 ;;
    v5p-12288) shape=16x16x24 ;;
    *) die "TOPOLOGY is '$TOPOLOGY' in $settings; name a slice such as v5e-256, v5p-128 or v6e-64" ;;
  esac
  chips=$((${shape//x/*}))
  chips_per_host=$((chips <= one_host ? chips : 4))
  hosts=$((chips / chips_per_host))
  machine=$machine-${chips_per_host}t
}

# run COMMAND...: show a command and, unless this is a dry run, run it.
run() {
  local line
  printf -v line '%q ' "$@"
  if [[ $dry_run == yes ]]; then
    printf '%s\n' "${line% }"
  else
    printf '+ %s\n' "${line% }" >&2
    "$@"
  fi
}

# confirm WORD WHAT: have the user type a word before something that costs or destroys.
confirm() {
  [[ $dry_run == no && $assume_yes == no ]] || return 0
  local answer
  printf '%s\nType "%s" to go on: ' "$2" "$1" >&2
  read -r answer || answer=
  [[ $answer == "$1" ]] || die "nothing was done; type $1 when asked, or give --yes"
}
