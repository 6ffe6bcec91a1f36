#!/usr/bin/env bash
# Ablations of router training in the mini world. The language model's feedback is collected once; then each file of
# configs/mini/ablations trains a router on it, and all routers choose a level for each held-out question.
#   bash scripts/ablations.sh [CONFIG ...]      (default: all of the folder)
# Finished work is skipped; killed anywhere, the same command continues. To start over: rm -rf runs/mini/ablations
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -x .venv/bin/python && -z ${VIRTUAL_ENV:-} ]]; then PATH=$PWD/.venv/bin:$PATH; fi

data=playground/data/mini
runs=runs/mini/ablations
if (($# == 0)); then set -- configs/mini/ablations/*.yaml; fi

if [[ ! -f $data/manifest.json ]]; then avg-llava mini data --output "$data"; fi
avg-llava feedback --config configs/mini/ablations/full.yaml --output "$runs/feedback"
routers=()
for config in "$@"; do
    bash scripts/train_stage4.sh "$config"
    routers+=("$runs/$(basename "$config" .yaml)")
done
avg-llava mini routers --model avg_llava/mini/checkpoint --data "$data" --answers "$runs/answers" "${routers[@]}"
