#!/usr/bin/env bash
# ChartQA, test: relaxed accuracy, of human and augmented questions and of all.
#   bash eval/chartqa.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark chartqa "$@"
