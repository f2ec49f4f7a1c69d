#!/usr/bin/env bash
# The same on Kubernetes (GKE): a JobSet over one slice or several. Values come from settings.env.
#
#   gke.sh pools               a node pool for each slice (costs from the moment its nodes are there)
#   gke.sh image               build the image from this repository and push it
#   gke.sh render              print the manifest with your values
#   gke.sh apply               start the run
#   gke.sh state               how run and pods are
#   gke.sh logs [HOST [SLICE]] follow one pod's log, that of the first host by default
#   gke.sh logs all            the end of every pod's log
#   gke.sh tensorboard         start TensorBoard on OUTPUT_DIR, at http://localhost:6006
#   gke.sh stop                have the run save, end and go; apply continues it
#   gke.sh delete              give the node pools back
#
#   --dry-run          print the commands, run none
#   --yes              do not ask
#   --settings FILE    another file than settings.env

# shellcheck source=recipes/tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  parse "$@"
  local verb=${arguments[0]:-}
  case $verb in
    pools | image | render | apply | state | logs | tensorboard | stop | delete) ;;
    '') usage && exit 2 ;;
    *)
      die "gke.sh has no '$verb'; there are pools, image, render, apply, state, logs, tensorboard, stop and delete"
      ;;
  esac
  load_settings
  need NAMESPACE "a namespace of the cluster, such as default"
  need KUBERNETES_SERVICE_ACCOUNT "a service account of that namespace, such as default"
  need IMAGE "the image to build and run, such as us-docker.pkg.dev/my-project/my-repository/gemma-xla:1"
  whole_number MAX_RESTARTS 0
  whole_number RUN_AS_USER 0
  "do_$verb" "${arguments[@]:1}"
}

do_pools() {
  need_cluster
  local options=("--machine-type=$machine" "--num-nodes=$hosts") slice
  ((hosts == 1)) || options+=("--tpu-topology=$shape")
  [[ $SPOT == no ]] || options+=(--spot)
  confirm "$NAME" "This makes $SLICES node pool(s) of $hosts machine(s), $((SLICES * chips)) chips in all, which cost by the hour until you delete them."
  for ((slice = 0; slice < SLICES; slice++)); do
    run gcloud container node-pools create "$NAME-$slice" "${where[@]}" "${options[@]}"
  done
}

do_image() {
  need_program docker "see https://docs.docker.com/engine/install"
  run docker build "--file=$here/Dockerfile" "--tag=$IMAGE" "$root"
  run docker push "$IMAGE"
}

do_render() {
  render "$here/jobset.yaml"
}

do_apply() {
  need_kubectl
  apply jobset
}

do_state() {
  need_kubectl
  run kubectl get jobset "$NAME" "--namespace=$NAMESPACE" --output=wide
  run kubectl get pods "--namespace=$NAMESPACE" "--selector=$selector" --output=wide
}

do_logs() {
  need_kubectl
  if [[ ${1:-0} == all ]]; then
    run kubectl logs "--namespace=$NAMESPACE" "--selector=$selector" --prefix --tail=50 \
      "--max-log-requests=$((SLICES * hosts))"
  else
    local pod=jobset.sigs.k8s.io/job-index=${2:-0},batch.kubernetes.io/job-completion-index=${1:-0}
    run kubectl logs "--namespace=$NAMESPACE" "--selector=$selector,$pod" --follow --tail=100
  fi
}

do_tensorboard() {
  need_kubectl
  apply tensorboard
  run kubectl rollout status "deployment/$NAME-tensorboard" "--namespace=$NAMESPACE"
  run kubectl port-forward "deployment/$NAME-tensorboard" "--namespace=$NAMESPACE" 6006:6006
}

do_stop() {
  need_kubectl
  confirm "$NAME" "This ends the run $NAME. What is in $OUTPUT_DIR stays."
  run kubectl delete jobset "$NAME" "--namespace=$NAMESPACE"
}

do_delete() {
  need_cluster
  local slice
  confirm "$NAME" "This deletes $SLICES node pool(s), $((SLICES * chips)) chips. What is in $OUTPUT_DIR stays."
  for ((slice = 0; slice < SLICES; slice++)); do
    run gcloud container node-pools delete "$NAME-$slice" "${where[@]}" --quiet
  done
}

need_cluster() {
  need PROJECT "the id of your Google Cloud project"
  need CLUSTER "the name of a GKE cluster"
  need LOCATION "the zone or region of that cluster"
  need_program gcloud "see https://cloud.google.com/sdk/docs/install"
  where=("--project=$PROJECT" "--cluster=$CLUSTER" "--location=$LOCATION")
}

need_kubectl() {
  need_program kubectl "see https://kubernetes.io/docs/tasks/tools"
  selector=jobset.sigs.k8s.io/jobset-name=$NAME
}

apply() { # MANIFEST
  local file
  file=$(mktemp)
  # shellcheck disable=SC2064 # now, as the variable is local
  trap "rm -f '$file'" EXIT
  render "$here/$1.yaml" >"$file"
  run kubectl apply "--filename=$file"
}

# A manifest with the values put in, by name. Text that bash would run stays text.
# shellcheck disable=SC2034
render() { # FILE
  local text name
  text=$(<"$1")
  local HOSTS=$hosts CHIPS_PER_HOST=$chips_per_host GKE_ACCELERATOR=$gke_accelerator GKE_TOPOLOGY=$shape
  local ARGUMENTS SPOT_SELECTOR='# any machines'
  ARGUMENTS=$(json_list "${train[@]}")
  [[ $SPOT == no ]] || SPOT_SELECTOR='cloud.google.com/gke-spot: "true"'
  for name in NAME NAMESPACE SLICES HOSTS CHIPS_PER_HOST GKE_ACCELERATOR GKE_TOPOLOGY SPOT_SELECTOR IMAGE \
    KUBERNETES_SERVICE_ACCOUNT MAX_RESTARTS RUN_AS_USER OUTPUT_DIR ARGUMENTS; do
    text=${text//"\${$name}"/"${!name}"}
  done
  printf '%s\n' "$text"
}

json_list() {
  local list='' item
  for item in "$@"; do
    item=${item//\\/\\\\}
    list+=", \"${item//\"/\\\"}\""
  done
  printf '[%s]' "${list#, }"
}

main "$@"
