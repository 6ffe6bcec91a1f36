#!/usr/bin/env bash
# Format, lint, types and tests, from a bare clone: makes the environment first. About ten minutes on two cores.
#   bash scripts/test.sh                       everything but the marks slow, gpu and network
#   bash scripts/test.sh tests/model -k splice arguments go to pytest
#   bash scripts/test.sh -m slow               the tests that take minutes each
#   bash scripts/test.sh -m gpu                the tests that need a CUDA device
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH
# Two workers share the cores: more threads in each only slow both down. Tests never go online.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

run() {
    echo "test: $*"
    "$@"
}

run ruff format --check .
run ruff check .
run mypy
# Tests of one xdist_group (those that start several processes) run one after the other, in one worker.
run pytest -n "${TEST_WORKERS:-2}" --dist loadgroup --durations 10 "$@"
echo "test: passed in $SECONDS s"
