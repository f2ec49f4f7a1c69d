#!/usr/bin/env bash
# Keep a run going on slices that are taken away now and then: create, install, run; when they are gone, again, until
# the run has ended. Leave it running on a machine that stays on. Values come from settings.env (SPOT, QUEUED=yes).
#
#   spot.sh [LIVES]    give up after so many slices, 20 by default
#
#   --dry-run          print the commands of one life, run none
#   --yes              do not ask
#   --settings FILE    another file than settings.env

# shellcheck source=recipes/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  parse "$@"
  load_settings
  need PROJECT "the id of your Google Cloud project"
  need ZONE "a zone that has TPU $TOPOLOGY, such as us-west4-a"
  one_of QUEUED yes
  local lives=${arguments[0]:-20} life
  [[ $lives =~ ^[1-9][0-9]*$ ]] || die "'$lives' is no number of lives; give a whole number from 1"
  need_program gcloud "see https://cloud.google.com/sdk/docs/install"
  confirm "$NAME" "This asks for $((SLICES * chips)) chips up to $lives times, and deletes them when the run has ended."
  if [[ $dry_run == yes ]]; then
    for verb in create wait install run state "logs all" delete; do
      # shellcheck disable=SC2086 # "logs all" is two words
      tpu $verb
    done
    return
  fi
  for ((life = 1; life <= lives; life++)); do
    printf 'Life %d of %d\n' "$life" "$lives" >&2
    tpu create
    if tpu wait && tpu install && tpu run; then
      watch
    else
      outcome=gone
    fi
    [[ $outcome == gone ]] || tpu logs all || true
    tpu delete
    case $outcome in
      finished)
        printf 'Finished: %s\n' "$OUTPUT_DIR" >&2
        return
        ;;
      failed) die "the run failed; its hosts' logs are in runs/tpu-logs/$NAME" ;;
    esac
  done
  die "the slice was taken away $lives times; run spot.sh again to continue"
}

tpu() {
  local options=(--yes "--settings" "$settings")
  [[ $dry_run == no ]] || options+=(--dry-run)
  bash "$here/tpu.sh" "$@" "${options[@]}"
}

# Wait until the run or the slice has ended; sets `outcome` to finished, failed or gone.
watch() {
  local state host
  while true; do
    sleep "${POLL_SECONDS:-30}"
    # No answer is no news: Google's, or the host's.
    state=$(gcloud compute tpus queued-resources describe "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
      "--format=value(state.state)") || continue
    if [[ $state != ACTIVE ]]; then
      outcome=gone
      return
    fi
    host=$(gcloud compute tpus queued-resources ssh "$NAME" "--project=$PROJECT" "--zone=$ZONE" --node=0 --worker=0 \
      "--command=bash gemma_xla/recipes/tpu/on_host.sh state") || continue
    case $host in
      finished | failed)
        outcome=$host
        return
        ;;
      running) ;;
      # Restarted under the run, say after maintenance.
      *) tpu run || continue ;;
    esac
  done
}

main "$@"
