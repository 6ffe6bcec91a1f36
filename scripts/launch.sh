#!/usr/bin/env bash
# Launches one training stage, or continues it from its latest checkpoint; called by scripts/train_stage{1..4}.sh.
set -euo pipefail

stage=$1
shift

usage() {
    cat <<EOF
usage: bash scripts/train_stage$stage.sh [CONFIG] [--key.subkey value ...] [--dry-run]

Trains stage $stage with the configuration CONFIG (default: configs/vicuna-7b/stage$stage.yaml); options override its values.
Paths in a configuration are relative to the root of the project. The same command continues a killed run, and does nothing
if the run is complete. With --dry-run it checks configuration, weights, data and disk without training.

  bash scripts/train_stage$stage.sh configs/mini/stage$stage.yaml --optim.lr 5e-4

Environment variables:
  NPROC_PER_NODE   processes per machine (default: one per GPU, or one on a CPU)
  NNODES           number of machines, which share a file system (default: 1); run the same command on each of them
  NODE_RANK        index of this machine, from 0
  MASTER_ADDR      address of machine 0
  MASTER_PORT      a free port of machine 0 (default: 29500; on a single machine, any free port)
  HOSTFILE         alternative to the last four: a DeepSpeed hostfile ("worker-1 slots=8" per line); run the command once,
                   on a machine with ssh access to all others

  NPROC_PER_NODE=8 NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/train_stage$stage.sh
  HOSTFILE=hosts.txt bash scripts/train_stage$stage.sh

The configuration selects DeepSpeed (runtime.deepspeed). Do not use \`accelerate launch --cpu\`, which disables it.
EOF
}

fail() {
    echo "train_stage$stage: $1" >&2
    exit 2
}

module=avg_llava.training.run
for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
        usage
        exit 0
    fi
    if [[ $argument == --dry-run ]]; then module=avg_llava.planning.dry_run; fi
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config=configs/vicuna-7b/stage$stage.yaml
if (($# > 0)) && [[ $1 != --* ]]; then
    config=$1
    shift
    if [[ -f $config ]]; then config=$(cd "$(dirname "$config")" && pwd)/$(basename "$config"); fi
fi
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -f $HOSTFILE ]] || fail "HOSTFILE $HOSTFILE does not exist"
    HOSTFILE=$(cd "$(dirname "$HOSTFILE")" && pwd)/$(basename "$HOSTFILE")
fi
cd "$root"
[[ -f $config ]] || fail "configuration $config does not exist (see --help)"
if [[ -x .venv/bin/python && -z ${VIRTUAL_ENV:-} ]]; then PATH=$root/.venv/bin:$PATH; fi

declared=$(sed -n 's/^stage:[[:space:]]*\([0-9]*\).*$/\1/p' "$config" | head -n 1)
[[ $declared == "$stage" ]] || fail "$config is for stage ${declared:-?}; use scripts/train_stage${declared:-N}.sh"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
nodes=${NNODES:-1}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE must be a whole number above 0, got $processes"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES must be a whole number above 0, got $nodes"
if ((gpus == 0)); then
    cores=$(python -c 'import os; print(os.cpu_count() or 1)')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

if [[ -n ${HOSTFILE:-} ]]; then
    exec deepspeed --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" --no_local_rank \
        --module "$module" "$config" "$@"
fi
if ((nodes > 1)); then
    [[ -n ${NODE_RANK:-} ]] || fail "NNODES=$nodes needs NODE_RANK, the number of this machine (0 to $((nodes - 1)))"
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes needs MASTER_ADDR, the address of machine 0"
    exec python -m torch.distributed.run --nnodes "$nodes" --node_rank "$NODE_RANK" --nproc_per_node "$processes" \
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" -m "$module" "$config" "$@"
fi
if ((processes == 1)); then
    exec python -m "$module" "$config" "$@"
fi
if [[ -n ${MASTER_PORT:-} ]]; then
    rendezvous=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT")
else
    rendezvous=(--standalone)
fi
exec python -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$processes" -m "$module" "$config" "$@"
