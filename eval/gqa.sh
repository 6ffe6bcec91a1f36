#!/usr/bin/env bash
# GQA, test-dev balanced: exact match.
#   bash eval/gqa.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark gqa "$@"
