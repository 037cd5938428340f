#!/usr/bin/env bash
# Make .venv at the top of the repository: this project, editable, with everything that it needs. From any directory:
#
#   bash launch/setup.sh
#
# Done once per Python and pyproject.toml; after that it answers in a moment. Settings, from the environment:
#   PYTHON              interpreter to build with; otherwise the first one found that is 3.10 or newer
#   DS_DGEMMA_PIP_ARGS  arguments for every `pip install`, such as an index with CPU builds of torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/ds_dgemma.ready            # what this .venv was made from; written last
unfinished=.venv/ds_dgemma.unfinished  # there while packages are being installed
read -ra pip_args <<<"${DS_DGEMMA_PIP_ARGS-}"

fail() {
    printf 'set-up: %s\n' "$@" >&2
    exit 1
}

# The path counts because scripts in .venv/bin hold it: a .venv that was moved is another one.
made_from() {
    { pwd -P && cat pyproject.toml launch/setup.sh && .venv/bin/python -VV; } 2>/dev/null | sha256sum
}

is_ready() {
    [[ -f $stamp && $(<"$stamp") == "$(made_from)" ]]
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        elif [[ $candidate == "${PYTHON-}" ]]; then
            fail "PYTHON=$PYTHON does not run, or is older than 3.10."
        fi
    done
    fail 'no Python 3.10 or newer found. Install one, or name it: PYTHON=/path/to/python3 bash launch/setup.sh'
}

make_venv() {
    local python
    python=$(find_python)
    printf 'set-up: .venv with %s\n' "$("$python" -V)"
    rm -rf .venv
    "$python" -m venv .venv || {
        rm -rf .venv
        fail "$python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
    }
}

install() {
    printf 'set-up: installing %s\n' "$1"
    shift
    local code=0
    .venv/bin/python -m pip install -qq --disable-pip-version-check "${pip_args[@]}" "$@" || code=$?
    ((code == 0)) && return
    # pip that fails by itself leaves everything as it was; pip that was killed does not.
    ((code > 128)) || rm -f "$unfinished"
    fail 'pip failed; its reason is above. Mend it and start again: what is done is kept.'
}

is_ready && exit
exec {lock}<pyproject.toml
flock --nonblock "$lock" || { echo 'set-up: waiting for another set-up in this directory'; flock "$lock"; }
is_ready && exit

if [[ -e $unfinished ]]; then
    echo 'set-up: the last one was interrupted; starting afresh'
    rm -rf .venv
fi
if ! grep -qsF "$(pwd -P)/.venv" .venv/bin/activate || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    make_venv  # there is none, it was moved here, or its Python is gone
fi
rm -f "$stamp"
touch "$unfinished"
# torch first and by itself: without a GPU an exact version lets pip prefer a CPU build, where an index offers one.
if nvidia-smi -L >/dev/null 2>&1; then
    install 'torch' 'torch>=2.13'
else
    install 'torch (no GPU found)' 'torch==2.13.0'
fi
DS_BUILD_OPS=0 install 'the project and its tools' --editable '.[dev]'
rm -f "$unfinished"
made_from >"$stamp"
printf 'set-up: ready after %d:%02d\n' $((SECONDS / 60)) $((SECONDS % 60))
