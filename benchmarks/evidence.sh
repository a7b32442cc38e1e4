#!/usr/bin/env bash
# The evidence of docs/RESULTS.md: trains MuM and the single-view MAE of configs/evidence/ with three seeds, evaluates
# them at several moments, and prints and draws the results. What exists is kept, so the same command goes on after a stop.
#
#   benchmarks/evidence.sh [FOLDER]
#
# FOLDER: of runs and results (runs/evidence). JOBS: runs side by side, one core each (2). SEEDS ("0 1 2"). ARMS
# ("mum mae"). PROBE: steps of the linear probes (1000). More arguments of the training: ARGS.
set -euo pipefail
cd "$(dirname "$0")/.."

export FOLDER=${1:-runs/evidence} PYTHON=${PYTHON:-python} PROBE=${PROBE:-1000} ARGS=${ARGS:-} OMP_NUM_THREADS=1
MOMENTS="2000 4000 8000 12500" # steps of 48 frames

evaluate() { # STEP, WEIGHTS, NAME, further arguments
  local out="$FOLDER/results/$1" weights=$2 name=$3
  shift 3
  for task in matching discriminant cosine attention; do
    [ -f "$out/$task-scenes-${name/ /_}.json" ] && continue
    local more=()
    [ "$task" = matching ] && more=(--steps "$PROBE" --choose-on train)
    "$PYTHON" -m fastmum.evaluate "$task" --weights "$weights" --name "$name" --size 64 --pictures 0 --out "$out" \
      "${more[@]}" "$@" >/dev/null
  done
}

train() { # ARM SEED
  local run="$FOLDER/$1-$2"
  "$PYTHON" -m fastmum.train --config "configs/evidence/$1.yaml" run.dir="$run" run.seed="$2" $ARGS
  for step in $MOMENTS; do
    evaluate "$step" "$run/checkpoints/$(printf 'step_%07d' "$step")" "$1 $2"
  done
  "$PYTHON" -m fastmum.evaluate views --weights "$run" --name "$1 $2" --size 64 --pictures 0 --out "$FOLDER/results/views" \
    >/dev/null
}
export MOMENTS
export -f evaluate train

for seed in ${SEEDS:-0 1 2}; do
  for arm in ${ARMS:-mum mae}; do echo "$arm $seed"; done
done | xargs -P "${JOBS:-2}" -L 1 bash -c 'train "$0" "$1"'
for seed in ${SEEDS:-0 1 2}; do
  evaluate 0 random:mum_tiny "untrained $seed" --seed "$seed" --set patch_size=8
done
for last in ${MOMENTS##* } views; do "$PYTHON" -m fastmum.evaluate.seeds "$FOLDER/results/$last" --plots "$FOLDER/plots"; done
"$PYTHON" -m fastmum.evaluate.curves "$FOLDER"/results/[0-9]* --plots "$FOLDER/plots"
