#!/usr/bin/env bash
# A shell, or a command, in a CUDA container with all of requirements.txt and requirements-cuda.txt.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: ./mamba-container.sh [COMMAND ...]

Starts COMMAND (without one, a shell) in a container that sees all GPUs and has this folder as its working folder.
The first start builds the container's image, Mamba's CUDA kernels included, which takes ten minutes and more.
Needs Docker with NVIDIA's container toolkit.

environment variables:
  BASE_IMAGE            what to build on; must have nvcc   (pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel)
  TORCH_CUDA_ARCH_LIST  the GPUs to build for, such as "8.6;9.0"; fewer build faster    (those that are here)
  DATASET               a folder to see as ./dataset                                     (./dataset)
  MAX_JOBS              compilers at once, each wants some 4 GB of memory                (4)

examples:
  ./mamba-container.sh
  DATASET=/data/sirs ./mamba-container.sh ./runner.sh 0 mdsrnet_l "in a container"
HELP
}

fail() {
    echo "mamba-container.sh: $*" >&2
    exit 2
}

case ${1:-} in
-h | --help)
    usage
    exit
    ;;
esac

cd "$(dirname -- "${BASH_SOURCE[0]}")"
command -v docker >/dev/null || fail "docker is not installed; https://docs.docker.com/engine/install says how to get it"
docker info >/dev/null 2>&1 || fail "docker does not answer: is its service running, and may you use it?"
architectures=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
    sort -u | paste -s -d ';' -)} || true
[ -n "$architectures" ] || fail "no NVIDIA GPU found here (nvidia-smi lists none)"
base=${BASE_IMAGE:-pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel}
data=${DATASET:-$PWD/dataset}
[ -d "$data" ] || [ -z "${DATASET:-}" ] || fail "DATASET=$DATASET: there is no such folder"

# Named after what goes into it, so that a change of that builds a new one.
recipe=$(
    cat <<DOCKERFILE
FROM $base
COPY requirements.txt requirements-cuda.txt /tmp/
RUN pip install --no-cache-dir -r /tmp/requirements.txt && \\
    CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-4} \\
    TORCH_CUDA_ARCH_LIST="$architectures" pip install --no-cache-dir --no-build-isolation -r /tmp/requirements-cuda.txt
DOCKERFILE
)
image=sirs-mamba:$(cat - requirements.txt requirements-cuda.txt <<<"$recipe" | cksum | cut -d ' ' -f 1)
if ! docker image inspect "$image" >/dev/null 2>&1; then
    echo "Building $image for GPUs of compute capability $architectures; this takes ten minutes and more"
    docker build --tag "$image" --file - . <<<"$recipe"
fi

# As oneself, so that what a run writes is one's own; shared memory is what the loader's workers hand samples over in.
options=(--rm --gpus all --ipc host --user "$(id -u):$(id -g)" --env HOME=/tmp --env PYTHON=python3
    --volume "$PWD:/workspace/sirs" --workdir /workspace/sirs)
[ ! -d "$data" ] || options+=(--volume "$(cd -- "$data" && pwd):/workspace/sirs/dataset")
[ ! -t 0 ] || options+=(--interactive --tty)
[ $# -gt 0 ] || set -- bash
exec docker run "${options[@]}" "$image" "$@"
