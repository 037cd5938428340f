#!/usr/bin/env bash
# The demo, from nothing to a solved Sudoku: a tiny DiffusionGemma of random weights learns 4x4 puzzles under ZeRO-3
# with expert parallelism, is exported, and unmodified transformers solves puzzles whose solutions it never saw.
#
#   bash launch/demo.sh [--prepare] [--set a.b=value ...]
#
#   --prepare        set up, make the model and the data, and stop there
#   --set a.b=value  override a setting of ds_configs/runs/sudoku.yaml
#
# Two processes share the experts on the CPU or on two GPUs; a single GPU holds them all. Started again, it continues
# where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=ds_configs/runs/sudoku.yaml
data=runs/sudoku-data
train_puzzles=40000
test_puzzles=200

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

prepare_only=
overrides=()
while (($#)); do
    case $1 in
    --prepare) prepare_only=1 ;;
    --set)
        (($# > 1)) || { echo "demo: --set needs a.b=value" >&2 && exit 2; }
        overrides+=(--set "$2") && shift
        ;;
    -h | --help) usage && exit ;;
    *) { echo "demo: unknown argument $1" && usage; } >&2 && exit 2 ;;
    esac
    shift
done

step=start
trap 'code=$?; ((code == 0)) || echo "demo: failed (exit code $code) at: $step" >&2' EXIT

begin() {
    step=$1
    printf '\n== %s\n' "$step"
}

minutes() {
    printf '%d:%02d' $(($1 / 60)) $(($1 % 60))
}

set_up() {
    begin 'set-up'
    bash launch/setup.sh
    export PATH="$PWD/.venv/bin:$PATH"
}

choose_devices() {
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    ranks=$((gpus == 1 ? 1 : 2))
    if ((gpus == 0)); then
        export DS_ACCELERATOR=cpu
    fi
}

prepare() {
    begin 'model and data'
    [[ -e $data/model ]] || ds-dgemma make-tiny --preset sudoku4 --out "$data/model"
    [[ -e $data/train.jsonl ]] ||
        ds-dgemma make-sudoku --size 4 --split train --count "$train_puzzles" --out "$data/train.jsonl"
    [[ -e $data/test.jsonl ]] ||
        ds-dgemma make-sudoku --size 4 --split test --count "$test_puzzles" --out "$data/test.jsonl"
    ls "$data"
}

read_config() { # what this script must know of the resolved config
    local settings
    settings=$(python - "$config" "${overrides[@]}" <<'PYTHON'
import sys
from pathlib import Path

from ds_dgemma.config.file import load_config
from ds_dgemma.errors import UserError

try:
    config = load_config(Path(sys.argv[1]), sys.argv[3::2])
except UserError as error:
    sys.exit(str(error))
print(config.run.dir, config.train.max_steps, config.train.global_batch_size, sep="\t")
PYTHON
    )
    IFS=$'\t' read -r run steps global_batch <<<"$settings"
}

# The ranks get a process group of their own, and a signal to this script goes to all of it: DeepSpeed's launcher dies
# of a signal without telling its children. Its exit code alone proves nothing; the export asks for the last step.
launch() {
    local code=0 stopped=
    set -m
    "$@" </dev/null &
    local group=$!
    set +m
    trap 'stopped=1; kill -TERM -- "-$group" 2>/dev/null || true' INT TERM HUP
    wait "$group" || code=$?
    while [[ $stopped ]] && kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
    trap - INT TERM HUP
    [[ -z $stopped ]] || code=130
    return "$code"
}

train() {
    begin "training on $ranks $( ((gpus)) && echo GPU || echo CPU) process(es)"
    local port devices=(--num_gpus "$ranks")
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    if ((gpus)) && [[ ${CUDA_VISIBLE_DEVICES-} =~ ^[0-9,]+$ ]]; then # --num_gpus would count from GPU 0
        devices=(--include "localhost:$(cut -d, -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
    fi
    if ((ranks == 1)); then
        overrides+=(--set parallel.expert_parallel_size=1 --set "train.micro_batch_size=$global_batch")
    fi
    local cores
    cores=$(env -u OMP_NUM_THREADS nproc) # nproc would answer OMP_NUM_THREADS
    OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1)) launch deepspeed "${devices[@]}" \
        --master_port "$port" --log_level error --module ds_dgemma.train --config "$config" "${overrides[@]}"
}

evaluate() {
    begin 'export to transformers'
    ds-dgemma export --run "$run" --step "$steps" --out "$run/export"
    begin "$test_puzzles held-out puzzles"
    ds-dgemma evaluate --model "$run/export" --data "$data/test.jsonl" --task sudoku --out "$run/evaluation.json"
    begin 'curves'
    ds-dgemma plot "$run"
}

set_up
setup_seconds=$SECONDS
prepare
[[ -z $prepare_only ]] || exit 0
choose_devices
read_config
training_began=$SECONDS
train
training_seconds=$((SECONDS - training_began))
evaluate

solved=$(python -c 'import json, sys; print(format(json.load(open(sys.argv[1]))["solved"], ".1%"))' "$run/evaluation.json")
printf '\nsolved   %s of %s held-out puzzles\ncurves   %s\nmodel    %s\ntimes    set-up %s, training %s, the rest %s\n' \
    "$solved" "$test_puzzles" "$run/plots/curves.png" "$run/export" \
    "$(minutes "$setup_seconds")" "$(minutes "$training_seconds")" \
    "$(minutes $((SECONDS - setup_seconds - training_seconds)))"
