#!/usr/bin/env bash
# TextVQA, validation: VQA accuracy over ten annotators.
#   bash eval/textvqa.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark textvqa "$@"
