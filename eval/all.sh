#!/usr/bin/env bash
# All twelve benchmarks, then the paper's tables and figures from their results. The same command continues a killed run.
#   bash eval/all.sh --model DIR [--output DIR] [any option of `avg-llava evaluate`]
#   bash eval/all.sh --sample    offline: small data sets of the mini world, answered by the shipped mini model; exits 1
#                                where a score is not the one in eval/expected/sample.json
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
