#!/usr/bin/env bash
# Train on the nodes of a hostfile. `launch/multinode.sh --help` and launch/README.md say how.
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit
[[ ! -x $top/.venv/bin/python ]] || export PATH="$top/.venv/bin:$PATH"
exec python -m ds_dgemma.launch.multinode "$@"
