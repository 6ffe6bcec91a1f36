#!/usr/bin/env bash
# VizWiz, val: VQA accuracy over ten annotators.
#   bash eval/vizwiz.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark vizwiz "$@"
