#!/usr/bin/env bash
# The demo, from nothing: a tiny DiffusionGemma of random weights learns 4x4 Sudoku, and unmodified transformers solves puzzles with it.
#
#   bash launch/demo.sh             # set up, prepare, train, export, solve, plot
#   bash launch/demo.sh --prepare   # set up and make the model and the puzzles, but do not train
#
# Two ranks that share the experts (two GPUs, or the CPU); with a single GPU one rank. Started again, it goes on where it stopped.
# Everything lies in runs/sudoku-data/ and runs/sudoku/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=runs/sudoku-data run=runs/sudoku
stage='reading its arguments'
trap 'echo "demo: stopped while $stage" >&2' ERR

seconds() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

if (($# > 1)) || [[ ${1-} != "" && ${1-} != --prepare ]]; then
    echo "usage: bash launch/demo.sh [--prepare]" >&2
    exit 2
fi

stage='setting up'
began=$SECONDS
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
set_up=$((SECONDS - began))

stage='preparing model and puzzles'
began=$SECONDS
[[ -f $data/model/config.json ]] || ds-dgemma make-tiny --preset sudoku4 --out $data/model
[[ -f $data/train.jsonl ]] || ds-dgemma make-sudoku --size 4 --split train --count 20000 --seed 1 --out $data/train.jsonl
[[ -f $data/test.jsonl ]] || ds-dgemma make-sudoku --size 4 --split test --count 200 --seed 2 --out $data/test.jsonl
[[ ${1-} == --prepare ]] && exit

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=2 overrides=()
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu
    cores=$(nproc)
    export OMP_NUM_THREADS=$((cores > 2 ? cores / 2 : 1))
elif ((gpus == 1)); then
    ranks=1
    overrides=(--set parallel.expert_parallel_size=1)
fi

stage='training'
port=$(python -c 'from ds_dgemma.engine.ranks import free_port; print(free_port())')
training=$SECONDS
deepspeed --num_gpus $ranks --master_port "$port" --module ds_dgemma.train --config ds_configs/runs/sudoku.yaml "${overrides[@]}"
trained=$((SECONDS - training))

stage='exporting'
ds-dgemma export --run $run --out $run/export
stage='solving puzzles'
ds-dgemma evaluate --model $run/export --data $data/test.jsonl --scorer sudoku --batch-size 200 --out $run/sudoku.json
stage='plotting'
ds-dgemma plot $run --out $run/plots/curves.png
python - $run/sudoku.json <<'END'
import json, sys
report = json.load(open(sys.argv[1]))
print(f"solved {report['solved']:.1%} of {report['examples']} held-out puzzles")
END
echo "curves: $PWD/$run/plots/curves.png"
echo "time: set-up $(seconds $set_up), training $(seconds $trained), everything after set-up $(seconds $((SECONDS - began)))"
