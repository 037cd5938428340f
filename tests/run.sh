#!/usr/bin/env bash
# Set up, then lint, format, types and tests: what CI runs. Arguments go to pytest:
#
#   bash tests/run.sh                    # everything
#   bash tests/run.sh -m "not slow"      # the daily loop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() {
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@" || {
        echo "== $name failed" >&2
        exit 1
    }
    echo "== $name: $((SECONDS - began)) s"
}

step 'set-up' bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
step 'format' ruff format --check .
step 'lint' ruff check .
step 'types' pyright
step 'tests' python -m pytest "$@"
