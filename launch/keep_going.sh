#!/usr/bin/env bash
# Start a training again until it is complete. `launch/keep_going.sh --help` and launch/README.md say how.
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit
python=$top/.venv/bin/python
[[ -x $python ]] || python=python
exec "$python" -m ds_dgemma.launch.keep_going "$@"
