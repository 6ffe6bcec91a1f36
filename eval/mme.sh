#!/usr/bin/env bash
# MME: perception and cognition scores.
#   bash eval/mme.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark mme "$@"
