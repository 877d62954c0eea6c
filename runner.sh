#!/usr/bin/env bash
# Trains one model; ./runner.sh --help says how.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: ./runner.sh GPU MODEL ["COMMENT"] [options of train_sirs.py]

  GPU      index of the GPU as nvidia-smi shows it; a list such as 0,1 for several GPUs, one process each;
           cpu; or mps on a Mac
  MODEL    a network of models/arch/__init__.py; also the name of the run: results go to checkpoints/MODEL
  COMMENT  what this run is, kept with its results; may be left out

Trains the model by the recipe of docs/training.md; an option at the end changes it, --config published-w to what the
published -W models ran. The first start looks for a
Python with all of requirements.txt and otherwise installs that into .venv. PYTHON=/path/to/python3 names the
Python to use. Wherever it is called from, it works in the project's folder, and relative paths start there.

examples:
  ./runner.sh 0 dsrnet_s "first try"
  ./runner.sh 0,1 dsrnet_l "two GPUs" --batchSize 2
  ./runner.sh cpu dsrnet_s "five epochs, another name" --nEpochs 5 --name short
  nohup ./runner.sh 1 mdsrnet_l "over night" > training.log 2>&1 &
  tensorboard --logdir checkpoints      (.venv/bin/tensorboard if the runner made .venv)

  ./runner.sh cpu dsrnet_s --help           all the options of train_sirs.py
HELP
}

fail() {
    say "runner.sh: $*"
    exit 2
}

commas() { paste -s -d , - | sed 's/,/, /g'; }

case ${1:-} in
-h | --help)
    usage
    exit
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

# shellcheck source=tools/environment.sh
. "$(dirname -- "$self")/tools/environment.sh"

[ $# -ge 1 ] || fail 'GPU and MODEL are missing; for example: ./runner.sh 0 dsrnet_s "first try"; see --help'
[ $# -ge 2 ] || fail "MODEL is missing; for example: ./runner.sh $1 dsrnet_s \"first try\"; see --help"
gpu=$1 model=$2 comment=
shift 2
case ${1:-} in
--*) ;;
*)
    comment=${1:-}
    shift $(($# > 0))
    ;;
esac

# CUDA_VISIBLE_DEVICES hides the other GPUs and numbers those that are left from 0: `ids` are these new numbers.
processes=1
case $gpu in
cpu) visible='' ids=-1 ;;
mps) visible='' ids=0 ;;
'' | *[!0-9,]* | ,* | *, | *,,*) fail "'$gpu' is not a GPU: give an index such as 0, a list such as 0,1, or cpu, or mps" ;;
*)
    visible=$gpu ids='' processes=0 seen=,
    gpus=$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\): \(.*\) (UUID.*/\1 \2/p') || true
    [ -n "$gpus" ] || fail "no NVIDIA GPU found here (nvidia-smi -L lists none); use cpu"
    for index in ${gpu//,/ }; do
        cut -d ' ' -f 1 <<<"$gpus" | grep -qx "$index" ||
            fail "there is no GPU $index here; there are: $(sed 's/ / (/; s/$/)/' <<<"$gpus" | commas)"
        case $seen in *,$index,*) fail "GPU $index is named twice in $gpu" ;; esac
        seen=$seen$index,
        ids=$ids${ids:+,}$processes
        processes=$((processes + 1))
    done
    ;;
esac

[ "$gpu" != cpu ] || CPU_ONLY=yes # read by use_environment
use_environment requirements.txt || exit 1
if [ ! . -ef "$ROOT" ]; then
    say "Working in $ROOT; relative paths start there"
    cd "$ROOT"
fi

models=$("$PYTHON" train_sirs.py --list_models) || {
    say "runner.sh: train_sirs.py could not list its models (see above)"
    exit 1
}
grep -Fqx -e "$model" <<<"$models" || fail "there is no model '$model'; there are: $(commas <<<"$models")"

export CUDA_VISIBLE_DEVICES=$visible
export CUDA_DEVICE_ORDER=PCI_BUS_ID # so that an index means the GPU that nvidia-smi shows under it
export PYTHONUNBUFFERED=1           # so that a log file has each line at once

# The published recipe is what train_sirs.py does by default, except for --if_align. Of an option given twice
# the last one counts, so what the user gives comes last. exec, so that signals reach Python itself.
set -- train_sirs.py --inet "$model" --name "$model" --comment="$comment" --if_align --gpu_ids "$ids" "$@"
if [ "$processes" -gt 1 ]; then
    # What torchrun hands on to its processes: Slurm's warnings, too; not SIGHUP where it is ignored, as under nohup.
    signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2
    [ -n "$(trap -p HUP)" ] || signals=$signals,SIGHUP
    export PET_SIGNALS_TO_HANDLE=$signals
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise torchrun's restarts find what the attempt before left there
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$processes" "$@"
fi
exec "$PYTHON" "$@"
