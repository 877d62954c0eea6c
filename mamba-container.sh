#!/usr/bin/env bash
# A CUDA container with all of requirements.txt and requirements-cuda.txt: built, started, entered, stopped.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: ./mamba-container.sh [run [COMMAND ...]]     COMMAND (a shell) in a container that goes when it ends
       ./mamba-container.sh start                   one that stays, in the background
       ./mamba-container.sh enter [COMMAND ...]     COMMAND (a shell) in that one, which is started if need be
       ./mamba-container.sh stop                    ends that one and whatever runs in it
       ./mamba-container.sh build                   builds the image, as run, start and enter do where it is missing
       ./mamba-container.sh pull IMAGE              takes a registry's image instead of building one

The image has Mamba's CUDA kernels, compiled for the GPUs that are here, which takes ten minutes and more. The container
has this folder as its working folder, and what is written in it belongs to you. Needs Docker or Podman and NVIDIA's
container toolkit.

environment variables:
  ENGINE                docker or podman                                                  (the first that is installed)
  GPUS                  the container's: all, none, or indices such as 0,1                (all)
  DATASET               a folder to see as ./dataset                                      (./dataset)
  SHM_SIZE              shared memory, such as 16g, apart from the host's                 (the host's)
  ENGINE_OPTIONS        more options of ENGINE run, such as "--network host --volume /data:/data"
  BASE_IMAGE            what to build on; must have nvcc                                  (the one in Dockerfile)
  TORCH_CUDA_ARCH_LIST  the GPUs to build for, such as "8.6;9.0"; fewer build faster      (those that are here)
  MAX_JOBS              compilers at once, each wants some 4 GB of memory                 (4)

examples:
  ./mamba-container.sh
  DATASET=/data/sirs GPUS=0 ./mamba-container.sh run ./runner.sh 0 mdsrnet_l "in a container"
  ./mamba-container.sh enter nvidia-smi
HELP
}

fail() {
    echo "mamba-container.sh: $*" >&2
    exit 2
}

here=/workspace/sirs # this folder, in the container

# Sets engine, and kind to what it is: docker may be podman by another name.
find_engine() {
    local name
    engine=${ENGINE:-}
    if [ -z "$engine" ]; then
        for name in docker podman; do
            command -v "$name" >/dev/null && engine=$name && break
        done
    fi
    [ -n "$engine" ] || fail "neither docker nor podman is installed; https://docs.docker.com/engine/install says how"
    command -v "$engine" >/dev/null || fail "ENGINE=$engine is not installed"
    about=$("$engine" info 2>/dev/null) || fail "$engine does not answer: is its service running, and may you use it?"
    kind=docker
    if "$engine" --version 2>/dev/null | grep -qi podman; then kind=podman; fi
}

# Sets image to a name made of what goes into it, so that a change of that is another image.
name_image() {
    architectures=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        sort -u | paste -s -d ';' -)} || true
    [ -n "$architectures" ] ||
        fail "no NVIDIA GPU found here (nvidia-smi lists none); TORCH_CUDA_ARCH_LIST=9.0 builds for one elsewhere"
    image=sirs-mamba:$(cat Dockerfile requirements.txt requirements-cuda.txt - <<<"${BASE_IMAGE:-} $architectures" |
        cksum | cut -d ' ' -f 1)
}

build() {
    local options=(--tag "$image" --build-arg "TORCH_CUDA_ARCH_LIST=$architectures"
        --build-arg "MAX_JOBS=${MAX_JOBS:-4}")
    [ -z "${BASE_IMAGE:-}" ] || options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    echo "Building $image for GPUs of compute capability $architectures; this takes ten minutes and more"
    "$engine" build "${options[@]}" --file Dockerfile .
}

# Adds what gives a container the GPUs to options.
add_gpus() {
    local gpus=${GPUS:-all} index
    [[ $gpus =~ ^(all|none|[0-9]+(,[0-9]+)*)$ ]] || fail "GPUS=$gpus is neither all, none nor indices such as 0,1"
    [ "$gpus" != none ] || return 0
    if [ "$kind" = podman ]; then
        nvidia-ctk cdi list 2>/dev/null | grep -q nvidia.com/gpu= ||
            fail "podman knows no GPU; do: sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml" \
                "(it comes with NVIDIA's container toolkit)"
        for index in ${gpus//,/ }; do options+=(--device "nvidia.com/gpu=$index"); done
    else
        # Looked for here only if docker's service is here, too.
        [ -n "${DOCKER_HOST:-}" ] || command -v nvidia-ctk >/dev/null || command -v nvidia-container-cli >/dev/null ||
            fail "NVIDIA's container toolkit is not installed;" \
                "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit says how"
        [ "$gpus" = all ] || gpus="\"device=$gpus\"" # in quotes, or a comma would end the value
        options+=(--gpus "$gpus")
    fi
}

# Sets options to those of a container's start.
set_options() {
    local data=${DATASET:-} weights more
    [ -n "${HOME-}" ] || unset HOME # ~ is then the home that the system's table of users has
    weights=~ # the system's, where HOME is not set
    weights=${TORCH_HOME:-$weights/.cache/torch}
    options=()
    add_gpus
    # Shared memory is what the loader's workers hand samples over in; a container's own has 64 MB.
    if [ -n "${SHM_SIZE:-}" ]; then options+=(--shm-size "$SHM_SIZE"); else options+=(--ipc host); fi

    # As oneself, so that what a run writes is one's own. Without root's rights, root within is oneself.
    if [ "$kind" = podman ]; then
        [ "$(id -u)" = 0 ] || options+=(--userns keep-id --user "$(id -u):$(id -g)")
    elif ! grep -q rootless <<<"$about"; then
        options+=(--user "$(id -u):$(id -g)")
    fi
    options+=(--env HOME=/tmp --env "USER=$(id -un)") # the user has neither in the container

    options+=(--volume "$PWD:$here" --workdir "$here" --security-opt label=disable) # or SELinux would keep it away
    [ -z "$data" ] || [ -d "$data" ] || fail "DATASET=$data: there is no such folder"
    [ -z "$data" ] || [ ! -L dataset ] || fail "DATASET=$data: ./dataset is a link; remove it, or leave DATASET out"
    if [ -n "$data" ]; then
        mkdir -p dataset # or the engine would, as root
        options+=(--volume "$(cd -- "$data" && pwd):$here/dataset")
    elif [ -L dataset ] && [ -d dataset ]; then
        data=$(cd dataset && pwd -P) # where the link leads to must be there, too
        options+=(--volume "$data:$data")
    fi
    mkdir -p "$weights" || fail "$weights: cannot be made; TORCH_HOME=DIR names another folder for VGG19's weights"
    options+=(--volume "$weights:/opt/torch" --env TORCH_HOME=/opt/torch)
    read -ra more <<<"${ENGINE_OPTIONS:-}"
    options+=(${more[@]+"${more[@]}"})
}

has_image() { "$engine" image inspect "$image" >/dev/null 2>&1; }

# How the container is that stays: true if it runs, false if it ended, nothing if there is none.
running() { "$engine" container inspect --format '{{.State.Running}}' "$container" 2>/dev/null || true; }

start() {
    set_options
    name_image
    has_image || build
    [ -z "$(running)" ] || "$engine" rm --force "$container" >/dev/null
    "$engine" run --detach --init --rm --name "$container" "${options[@]}" "$image" sleep infinity >/dev/null
    echo "Started $container"
}

terminal=(--interactive)
if [ -t 0 ] && [ -t 1 ]; then terminal+=(--tty); fi

command=${1:-run}
[ $# = 0 ] || shift
case $command in
-h | --help | help)
    usage
    exit
    ;;
run | enter)
    [ $# -gt 0 ] || set -- bash
    ;;
pull)
    [ $# = 1 ] || fail "pull takes the name of one image, such as registry.example.org/sirs-mamba:latest"
    ;;
build | start | stop)
    [ $# = 0 ] || fail "$command takes no arguments"
    ;;
*)
    fail "there is no $command; run $command ... runs a command, --help lists what there is"
    ;;
esac

# The file itself, where this is called through a symbolic link.
self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do
    target=$(readlink -- "$self")
    case $target in
    /*) self=$target ;;
    *) self=$(dirname -- "$self")/$target ;;
    esac
done
CDPATH='' cd -- "$(dirname -- "$self")"
find_engine
container=sirs-$(id -u)-$(cksum <<<"$PWD" | cut -d ' ' -f 1) # one for each user and folder

case $command in
build)
    name_image
    build
    ;;
pull)
    name_image
    "$engine" pull "$1"
    "$engine" tag "$1" "$image"
    ;;
run)
    set_options
    name_image
    has_image || build
    exec "$engine" run --init --rm "${terminal[@]}" "${options[@]}" "$image" "$@"
    ;;
start)
    if [ "$(running)" = true ]; then echo "$container is running"; else start; fi
    ;;
enter)
    [ "$(running)" = true ] || start
    exec "$engine" exec "${terminal[@]}" "$container" "$@"
    ;;
stop)
    [ -n "$(running)" ] || fail "$container is not there"
    "$engine" stop "$container" >/dev/null
    echo "Stopped $container"
    ;;
esac
