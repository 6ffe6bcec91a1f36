#!/usr/bin/env bash
# ScienceQA, the test questions with an image: accuracy.
#   bash eval/scienceqa.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark scienceqa "$@"
