#!/usr/bin/env bash
# AI2D, test: accuracy.
#   bash eval/ai2d.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark ai2d "$@"
