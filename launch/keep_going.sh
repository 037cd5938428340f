#!/usr/bin/env bash
# Start a training again until it is complete. `launch/keep_going.sh --help` and launch/README.md say how.
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit
[[ ! -x $top/.venv/bin/python ]] || export PATH="$top/.venv/bin:$PATH"
exec python -m ds_dgemma.launch.keep_going "$@"
