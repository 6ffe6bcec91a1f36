#!/usr/bin/env bash
# Launches one training stage; scripts/train_stage{1..4}.sh call it. The same command continues a run that was killed.
set -euo pipefail

stage=$1
shift

usage() {
    cat <<EOF
usage: bash scripts/train_stage$stage.sh [CONFIG] [--key.subkey value ...] [--dry-run]

Trains stage $stage as CONFIG (default: configs/vicuna-7b/stage$stage.yaml) says; options go over its values. Paths inside a
configuration are relative to the root of the project. Run again, it continues a killed run and leaves a finished one alone.
With --dry-run it looks for all that could go wrong (configuration, weights, data, disk), trains nothing and leaves nothing.

  bash scripts/train_stage$stage.sh configs/mini/stage$stage.yaml --optim.lr 5e-4

Where it runs is said by the environment:
  NPROC_PER_NODE   processes on this machine      (default: one for each GPU, one on a CPU)
  NNODES           machines that share a file system (default: 1); run the same command on each, with its
  NODE_RANK        number, from 0,
  MASTER_ADDR      the address of machine 0, and
  MASTER_PORT      a free port there              (default: 29500; a free one on a single machine)
  HOSTFILE         instead: a DeepSpeed hostfile ("worker-1 slots=8" per line), run on one machine with ssh to all

  NPROC_PER_NODE=8 NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/train_stage$stage.sh
  HOSTFILE=hosts.txt bash scripts/train_stage$stage.sh

DeepSpeed is chosen by the configuration (runtime.deepspeed). \`accelerate launch --cpu\` would run without it: use this.
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
