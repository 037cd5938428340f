#!/usr/bin/env bash
# Every check of the repository: format, lint, types, tests. Sets itself up. Arguments go to pytest:
#
#   bash tests/run.sh                 all of it
#   bash tests/run.sh -m "not slow"   the daily loop
#   bash tests/run.sh -n 0 --pdb -k ...  in one process, for a debugger
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
bash launch/setup.sh || exit
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start ranks of their own, which would fight for the cores
nvidia-smi -L >/dev/null 2>&1 || export DS_ACCELERATOR=cpu

failed=()
check() {
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - began))
}

check format ruff format --check --quiet .
check lint ruff check --quiet .
check types pyright
# two more than CI has cores: many a test waits for processes that wait for each other
check tests python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@"

((${#failed[@]} == 0)) && exit
printf 'failed: %s\n' "${failed[*]}"
exit 1
