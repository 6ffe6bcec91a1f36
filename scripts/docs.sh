#!/usr/bin/env bash
# Builds the documentation and the API reference into build/docs, offline; a warning is an error.
#   bash scripts/docs.sh           then open build/docs/index.html
#   bash scripts/docs.sh --serve   rebuilds on every change and serves the pages on localhost:8000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH NO_MKDOCS_2_WARNING=1
if [[ ${1:-} == --serve ]]; then
    exec mkdocs serve
fi
mkdocs build --strict --quiet "$@"
echo "docs: build/docs/index.html"
