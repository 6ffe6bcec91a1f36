#!/usr/bin/env bash
# Makes the environment .venv, or brings it up to date. Does nothing when it is; can be killed and run again.
#   PYTHON=python3.12 bash scripts/setup.sh     another interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.installed      # what was installed, written last
started=$venv/.installing   # there while an installation runs: found at the start, the last one was cut short

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if command -v "$candidate" >/dev/null && is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.11 or newer was not found (tried: ${PYTHON:-python3, python3.11 to python3.13, python})." >&2
    echo "setup: install one, or name it: PYTHON=/path/to/python3.12 bash scripts/setup.sh" >&2
    return 1
}

# One installation at a time, where the system has flock.
if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock 9
fi

# The folder is part of the identity: a moved environment does not work.
wanted=$({ pwd; cat pyproject.toml constraints.txt; } | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && is_recent $venv/bin/python; then
    exit 0
fi

began=$SECONDS
if [[ -f $started ]] || ! is_recent $venv/bin/python; then
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version)"
    rm -rf $venv
    if ! "$python" -m venv $venv; then
        rm -rf $venv
        echo "setup: \`$python -m venv\` failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
fi
touch $started
rm -f $stamp
echo "setup: installing the pinned dependencies (a few minutes the first time)"
options=(--disable-pip-version-check)
[[ -t 1 ]] || options+=(--quiet)  # a person sees the progress, a log only what went wrong
# Build environments take the same pins as the environment itself, so that one pin of torch holds everywhere.
export PIP_CONSTRAINT=$PWD/constraints.txt
$venv/bin/python -m pip install "${options[@]}" --editable '.[train,eval,serve,demo,quant,dev]'
# Its requirements are those of all its tasks and models; what ours need is in the extra `eval`.
$venv/bin/python -m pip install "${options[@]}" --no-deps lmms-eval
# open_clip and what it imports, for its tests, in a folder that no path names: torchvision has no CPU build, and one that
# cannot be imported breaks transformers. Users install the extra `open_clip`.
rm -rf $venv/open_clip
$venv/bin/python -m pip install "${options[@]}" --no-deps --target $venv/open_clip open_clip_torch torchvision timm ftfy
echo "$wanted" >$stamp
rm -f $started
echo "setup: done in $((SECONDS - began)) s"
