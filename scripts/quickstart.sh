#!/usr/bin/env bash
# From a bare machine to a trained, routed model and a report, in the mini world. Nothing to download but the packages.
#   bash scripts/quickstart.sh
# Finished steps are skipped; killed anywhere, the same command continues. To start over: rm -rf runs/mini
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH
data=playground/data/mini
runs=runs/mini
report=$runs/report
mkdir -p "$runs/done"

# Two processes: on two GPUs if there are, on the single GPU one process, else on the CPU with half of the cores each.
# Mini models gain nothing from more.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 1)); then export NPROC_PER_NODE=1; else export NPROC_PER_NODE=2; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# step NAME RESULT INPUTS COMMAND...: runs the command unless RESULT is there and was made from the same INPUTS (files).
step() {
    local name=$1 result=$2 inputs=$3 key began
    shift 3
    # shellcheck disable=SC2086  # inputs are several words
    key=$(cat $inputs | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1)
    if [[ -f $result && -f $runs/done/$name && $(<"$runs/done/$name") == "$key" ]]; then
        echo "quickstart: $name is done ($result)"
        return
    fi
    echo "quickstart: $name"
    began=$SECONDS
    "$@"
    printf '%s\t%s\n' "$name" "$((SECONDS - began))" >>"$runs/times.tsv"
    echo "$key" >"$runs/done/$name"
    echo "quickstart: $name took $((SECONDS - began)) s"
}

step data "$data/manifest.json" "avg_llava/mini/*.py" avg-llava mini data --output "$data"
start=$data/manifest.json # what a stage starts from: its data, and the stage before it
for stage in 1 2 3 4; do
    config=configs/mini/stage$stage.yaml
    result=$runs/stage$stage/stage.json
    step "stage$stage" "$result" "$config $start" bash "scripts/train_stage$stage.sh" "$config"
    start="$data/manifest.json $result"
done
# Always run, since it prints the table: cheap when all questions are answered.
echo "quickstart: evaluation and report"
avg-llava mini claims --runs "$runs" --data "$data" --output "$report"
echo "quickstart: finished after $((SECONDS / 60)) min $((SECONDS % 60)) s; open $report/index.html"
