#!/usr/bin/env bash
# MMBench, Chinese dev: accuracy over all rotations of the options.
#   bash eval/mmbench_cn.sh --model DIR [--granularity N|auto|random] [--limit N] [--data DIR]
PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
exec avg-llava evaluate --benchmark mmbench_cn "$@"
