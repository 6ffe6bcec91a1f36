#!/usr/bin/env bash
# MMMU, validation: accuracy.
#   bash eval/mmmu.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark mmmu "$@"
