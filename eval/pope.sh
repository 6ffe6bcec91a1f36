#!/usr/bin/env bash
# POPE, its three categories together: F1, accuracy, precision and recall.
#   bash eval/pope.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark pope "$@"
