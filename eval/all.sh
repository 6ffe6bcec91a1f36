#!/usr/bin/env bash
# All twelve benchmarks, then the paper's tables and figures from their results. The same command continues an interrupted run.
#   bash eval/all.sh --model DIR [--output DIR] [any option of `avg-llava evaluate`]
#   bash eval/all.sh --sample    offline: the mini world's data sets and the shipped mini model; exits with 1 if a
#                                score differs from eval/expected/sample.json
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$PATH:$root/.venv/bin

output=runs/eval
if [[ ${1:-} == --sample ]]; then
    shift
    cd "$root"
    export HF_HUB_OFFLINE=1
    data=playground/data/benchmarks
    avg-llava mini benchmarks --output "$data"
    set -- --data "$data" --model avg_llava/mini/checkpoint --check eval/expected/sample.json --output runs/eval-sample "$@"
fi
for ((i = 1; i < $#; i++)); do
    if [[ ${!i} == --output ]]; then output=${*:i+1:1}; fi
done
avg-llava evaluate --benchmark all --output "$output" "$@"
avg-llava report "$output"/*.json --output "$output/report"
