#!/usr/bin/env bash
# TPU VMs: one slice, or several from Google's queue. Values come from settings.env.
#
#   tpu.sh create              ask for the slice (costs from the moment you get it)
#   tpu.sh wait                wait until it is there
#   tpu.sh install             copy this repository (what is committed) to all hosts, and install it
#   tpu.sh run                 start the run on all hosts, or continue it
#   tpu.sh state               how slice and run are
#   tpu.sh logs [HOST [SLICE]] follow the run's log on one host, the first by default
#   tpu.sh logs all            fetch the end of every host's log into runs/tpu-logs/NAME
#   tpu.sh stop                have the run save and end
#   tpu.sh delete              give the slice back
#
#   --dry-run          print the commands, run none
#   --yes              do not ask
#   --settings FILE    another file than settings.env

# shellcheck source=recipes/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder=gemma_xla

main() {
  parse "$@"
  local verb=${arguments[0]:-}
  case $verb in
    create | wait | install | run | state | logs | stop | delete) ;;
    '') usage && exit 2 ;;
    *) die "tpu.sh has no '$verb'; there are create, wait, install, run, state, logs, stop and delete" ;;
  esac
  load_settings
  need PROJECT "the id of your Google Cloud project"
  need ZONE "a zone that has TPU $TOPOLOGY, such as us-west4-a"
  one_of QUEUED yes no
  [[ $SLICES == 1 || $QUEUED == yes ]] || die "SLICES is $SLICES and QUEUED is no in $settings; several slices come from" \
    "the queue: set QUEUED=yes"
  need_program gcloud "see https://cloud.google.com/sdk/docs/install"
  where=("--project=$PROJECT" "--zone=$ZONE")
  if [[ $QUEUED == yes ]]; then
    tpus=(gcloud compute tpus queued-resources)
  else
    tpus=(gcloud compute tpus tpu-vm)
  fi
  "do_$verb" "${arguments[@]:1}"
}

do_create() {
  local options=("--accelerator-type=$accelerator" "--version=$runtime")
  if [[ $QUEUED == yes ]]; then
    options=("--accelerator-type=$accelerator" "--runtime-version=$runtime")
    if ((SLICES == 1)); then
      options+=("--node-id=$NAME")
    else
      options+=("--node-count=$SLICES" "--node-prefix=$NAME")
    fi
  fi
  [[ $SPOT == no ]] || options+=(--spot)
  [[ -z $SERVICE_ACCOUNT ]] || options+=("--service-account=$SERVICE_ACCOUNT")
  confirm "$NAME" "This asks for $((SLICES * chips)) chips ($SLICES x $TOPOLOGY), which cost by the hour until you delete them."
  run "${tpus[@]}" create "$NAME" "${where[@]}" "${options[@]}"
}

do_wait() {
  # Google has one word for how a slice is.
  local state field=state ready=READY
  [[ $QUEUED == no ]] || field=state.state ready=ACTIVE
  local ask=("${tpus[@]}" describe "$NAME" "${where[@]}" "--format=value($field)")
  if [[ $dry_run == yes ]]; then
    run "${ask[@]}"
    return
  fi
  while state=$("${ask[@]}"); [[ $state != "$ready" ]]; do
    case $state in
      ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | CREATING | STARTING | RESTARTING | REPAIRING) ;;
      *) die "$NAME is ${state:-not there}, and will not become $ready; see tpu.sh state, then tpu.sh delete and create" ;;
    esac
    printf '%s: %s\n' "$NAME" "$state" >&2
    sleep "${POLL_SECONDS:-30}"
  done
}

do_install() {
  local archive
  archive=$(mktemp -d)/$folder.tar.gz
  # shellcheck disable=SC2064 # now, as the variable is local
  trap "rm -rf '${archive%/*}'" EXIT
  git -C "$root" diff --quiet HEAD -- || printf 'warning: what is not committed is not copied\n' >&2
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  local all=(--worker=all)
  [[ $QUEUED == no ]] || all+=(--node=all)
  run "${tpus[@]}" scp "$archive" "$NAME:$folder.tar.gz" "${where[@]}" "${all[@]}"
  on_hosts all all "mkdir -p $folder && tar -xzf $folder.tar.gz -C $folder && $(on_host install "$HF_TOKEN_SECRET")"
}

do_run() {
  on_hosts all all "$(on_host start "${train[@]}")"
}

do_state() {
  run "${tpus[@]}" describe "$NAME" "${where[@]}"
  on_hosts all all "$(on_host state)"
}

do_logs() {
  if [[ ${1:-0} == all ]]; then
    local logs=runs/tpu-logs/$NAME
    run mkdir -p "$logs"
    on_hosts all all "$(on_host logs)" "--output-directory=$logs"
  else
    on_hosts "${1:-0}" "${2:-0}" "$(on_host logs --follow)"
  fi
}

do_stop() {
  on_hosts all all "$(on_host stop)"
}

do_delete() {
  confirm "$NAME" "This deletes $NAME: $((SLICES * chips)) chips and the disks of their hosts. What is in $OUTPUT_DIR stays."
  local options=(--quiet)
  [[ $QUEUED == no ]] || options+=(--force)
  run "${tpus[@]}" delete "$NAME" "${where[@]}" "${options[@]}"
}

# The command line for on_host.sh, quoted for the shell of a host.
on_host() {
  local line
  printf -v line '%q ' bash "$folder/recipes/tpu/on_host.sh" "$@"
  printf '%s' "${line% }"
}

on_hosts() { # HOST SLICE COMMAND [OPTION...]; HOST and SLICE are numbers, or all
  local options=("--worker=$1" "--command=$3" "${@:4}")
  [[ $QUEUED == no ]] || options=("--node=$2" "${options[@]}")
  run "${tpus[@]}" ssh "$NAME" "${where[@]}" "${options[@]}"
}

main "$@"
