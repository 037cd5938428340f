#!/usr/bin/env bash
# Every check that needs a GPU, on one device, in under 10 minutes:
#
#   bash tests/gpu.sh [--wheels DIR] [--out DIR] [--only REGEX] [--rehearse]
#
# Prints a line per check and writes a dated table, gpu-YYYY-MM-DD-CARD.md, to --out (tests/benchmarks). Exit code 1 when a check fails.
# --only runs the checks whose names match.
# Without a GPU, --rehearse runs the same at miniature shapes on the CPU; it writes a table only where --out says so.
#
# --wheels is for a machine that has torch and no network: the other packages are put on top of the python3 (or $PYTHON) that has it,
# in a folder that is removed afterwards. To fill DIR, on a machine with a network, in a checkout with its .venv
# (about 50 MiB; give the Python version of the GPU machine):
#
#   bash tests/gpu/wheels.sh DIR 3.12
#
# Without --wheels: the active virtual environment, else .venv. A copy without .git: name the commit in $COMMIT.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    echo 'usage: bash tests/gpu.sh [--wheels DIR] [--out DIR] [--only REGEX] [--rehearse]' >&2
    exit 2
}

absolute() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

wheels='' arguments=()
while (($#)); do
    case $1 in
        --wheels | --out)
            (($# > 1)) || usage
            if [[ $1 == --wheels ]]; then wheels=$(absolute "$2"); else arguments+=(--out "$(absolute "$2")"); fi
            shift
            ;;
        --only)
            (($# > 1)) || usage
            arguments+=(--only "$2")
            shift
            ;;
        --rehearse)
            arguments+=(--rehearse)
            export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=''
            ;;
        *) usage ;;
    esac
    shift
done

if [[ $wheels ]]; then
    python=${PYTHON:-python3}
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # A folder on PYTHONPATH rather than a venv: a venv made from one does not see the torch of the first.
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site:$PWD
elif [[ ${VIRTUAL_ENV-} ]]; then
    python=$VIRTUAL_ENV/bin/python
else
    python=.venv/bin/python
fi

# One thread keeps the small CPU parts from fighting; no hub: everything is made on the spot.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
"$python" -m tests.gpu.report "${arguments[@]}"
