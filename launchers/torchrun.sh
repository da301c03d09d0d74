#!/usr/bin/env bash
# Trains on this machine's ranks, or on one machine's share of a cluster. See --help.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launchers/torchrun.sh [options] --config FILE [key=value ...]

  --config FILE             what to train (configs/*.yaml)
  --overrides FILE          overrides that tools.tune wrote, with its number of ranks and threads unless given here
  --nproc N                 ranks on this machine; default: one a GPU, without a GPU 2
  --threads N               threads of each rank; default: OMP_NUM_THREADS, or else cores / ranks
  --nnodes N                machines of the job; default: 1
  --node-rank R             which of them this is: 0 .. N-1; machine 0 hosts the rendezvous
  --rdzv-endpoint HOST:PORT where machine 0 is reached from all of them
  --max-restarts N          start all ranks again after one was killed, crashed or hung, so often; default: 0
  --grace SECONDS           that ranks get to save after SIGTERM or SIGUSR1, before they are killed; default: 30
  key=value                 overrides of the config: train.max_steps=100

Python: .venv/bin/python of this repository, or else python on the PATH; the variable PYTHON names another.

examples:
  launchers/torchrun.sh --nproc 2 --config configs/quickstart.yaml train.max_steps=100
  launchers/torchrun.sh --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29500 --nproc 8 --config my.yaml
EOF
}

fail() {
    printf 'launchers/torchrun.sh: %s\nSee launchers/torchrun.sh --help\n' "$1" >&2
    exit 2
}

whole() { # name value least
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3)); then fail "$1 must be a whole number from $3, but is '$2'"; fi
}

max_restarts=0 grace=30 nproc="" threads="" nnodes=1 node_rank="" endpoint="" config="" tuned="" overrides=()
while (($#)); do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --nproc | --threads | --nnodes | --node-rank | --rdzv-endpoint | --config | --overrides | --max-restarts | --grace)
        (($# > 1)) || fail "$1 needs a value"
        case $1 in
        --nproc) whole "$1" "$2" 1 && nproc=$2 ;;
        --threads) whole "$1" "$2" 1 && threads=$2 ;;
        --nnodes) whole "$1" "$2" 1 && nnodes=$2 ;;
        --node-rank) whole "$1" "$2" 0 && node_rank=$2 ;;
        --max-restarts) whole "$1" "$2" 0 && max_restarts=$2 ;;
        --grace) whole "$1" "$2" 0 && grace=$2 ;;
        --rdzv-endpoint) endpoint=$2 ;;
        --config) config=$2 ;;
        --overrides) tuned=$2 ;;
        esac
        shift 2
        ;;
    -*) fail "unknown option $1" ;;
    *=*) overrides+=("$1") && shift ;;
    *) fail "'$1' is neither an option nor an override of the form key=value" ;;
    esac
done
[[ -n $config ]] || fail "--config is missing"

if ((nnodes == 1)); then
    [[ -z $node_rank$endpoint ]] || fail "--node-rank and --rdzv-endpoint need --nnodes above 1"
    rendezvous=(--standalone)
else
    [[ -n $node_rank ]] || fail "--nnodes $nnodes needs --node-rank"
    ((node_rank < nnodes)) || fail "--node-rank ($node_rank) must be below --nnodes ($nnodes)"
    [[ $endpoint =~ ^.+:[0-9]+$ ]] || fail "--nnodes $nnodes needs --rdzv-endpoint HOST:PORT, but it is '$endpoint'"
    is_host=$( ((node_rank == 0)) && echo true || echo false)
    rendezvous=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id dlrm_scale --rdzv-conf "is_host=$is_host")
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null ||
    fail "'$python' has no torch; run make install (or set PYTHON), then make doctor"

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if [[ -n $tuned ]]; then
    launch=$("$python" -m dlrm_scale.overrides "$tuned") || exit 2
    read -r tuned_ranks tuned_threads <<<"$launch"
    [[ -n $nproc ]] || ((tuned_ranks % nnodes == 0)) ||
        fail "$tuned is for $tuned_ranks ranks, which --nnodes $nnodes machines cannot share evenly; give --nproc"
    nproc=${nproc:-$((tuned_ranks / nnodes))} threads=${threads:-$tuned_threads}
fi
cores=$(nproc)
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[[ -n $nproc ]] || nproc=$((gpus > 0 ? gpus : 2))
export OMP_NUM_THREADS=${threads:-${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}}

exec "$python" -m launchers.elastic "${rendezvous[@]}" --nproc-per-node "$nproc" \
    --max-restarts "$max_restarts" --shutdown-timeout "$grace" \
    -m dlrm_scale.training.main --config "$config" ${tuned:+--overrides "$tuned"} "${overrides[@]}"
