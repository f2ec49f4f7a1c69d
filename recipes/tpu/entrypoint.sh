#!/usr/bin/env bash
# The first process of the image's containers. It becomes the recipe itself: so SIGTERM reaches it, and its exit code is
# the container's. `accelerate launch` in its place would keep SIGTERM to itself and make every exit code 1.
set -euo pipefail

# A TPU's driver locks memory of the host (https://cloud.google.com/kubernetes-engine/docs/how-to/tpus#privileged-mode).
if [[ ${PJRT_DEVICE:-} == TPU ]] && ! ulimit -l 68719476736 2>/dev/null; then
  printf 'warning: no more than %s kB of memory can be locked; the TPU may want more\n' "$(ulimit -l)" >&2
fi
exec python "$@"
