#!/usr/bin/env bash
# Fill a folder with what `tests/gpu.sh --wheels` puts beside torch, in the versions of this checkout's .venv:
#
#   bash tests/gpu/wheels.sh DIR [PYTHON_VERSION]
#
# For x86-64 Linux; PYTHON_VERSION (such as 3.12) is the GPU machine's, by default .venv's. torch itself and what only other commands
# import (datasets, wandb, matplotlib) stay out.
set -euo pipefail
out=${1:?usage: bash tests/gpu/wheels.sh DIR [PYTHON_VERSION]}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
version=${2:-$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])')}

# All that the checks import and torch does not bring, closed under requirements.
wanted=$($python - <<'END'
from importlib.metadata import distribution
from packaging.requirements import Requirement

skip = {"torch"}
left, found = ["deepspeed", "transformers", "safetensors", "huggingface-hub", "pydantic", "pyyaml", "rich", "numpy", "psutil", "xxhash"], {}
while left:
    name = left.pop()
    if name in found or name in skip:
        continue
    package = distribution(name)
    found[name] = package.version
    for requirement in map(Requirement, package.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            left.append(requirement.name.lower().replace("_", "-"))
print("\n".join(f"{name}=={version}" for name, version in sorted(found.items())))
END
)
# DeepSpeed comes as source only; without its compiled operators it is the same for every Python.
DS_BUILD_OPS=0 $python -m pip wheel --quiet --no-deps --wheel-dir "$out" "$(grep '^deepspeed==' <<<"$wanted")"
platforms=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for minor in 17 24 27 28; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
grep -v '^deepspeed==' <<<"$wanted" |
    $python -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" --implementation cp \
        "${platforms[@]}" --dest "$out" --requirement /dev/stdin
du -sh "$out"
