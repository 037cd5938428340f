#!/usr/bin/env bash
# Build the wheel, install it into an environment of its own, and use it outside the repository:
#
#   bash tests/wheel.sh OUT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:?where the wheel goes}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
${PYTHON:-python3} -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/pip" install --quiet ${DS_DGEMMA_PIP_ARGS:-} "$@"; }
pip build
mkdir "$scratch/source" # setuptools leaves a build/ behind
git ls-files -z | xargs -0 cp --parents --target-directory "$scratch/source"
"$scratch/venv/bin/python" -m build --wheel --outdir "$out" "$scratch/source"
pip torch==2.13.0 # by itself, as launch/setup.sh has it where there is no GPU
pip "$out"/ds_dgemma-*.whl
cd "$scratch"
export PATH="$scratch/venv/bin:$PATH" DS_ACCELERATOR=cpu
ds-dgemma --help
ds-dgemma make-tiny --preset sudoku4 --out model
ds-dgemma make-sudoku --size 4 --split train --count 20 --out train.jsonl
printf '%s\n' 'run: {dir: run}' 'model: {path: model}' 'data: {train: train.jsonl}' \
    'train: {max_steps: 2, global_batch_size: 2, micro_batch_size: 1}' 'deepspeed: zero.json' >config.yaml
printf '{"zero_optimization": {"stage": 3}}\n' >zero.json
ds-dgemma plan --config config.yaml --gpus 2
