#!/usr/bin/env bash
# The evidence of docs/RESULTS.md: trains MuM and the single-view MAE of configs/evidence/ with three seeds, measures them
# and untrained models by every evaluation, trains the downstream tasks on the frozen encoders, and prints and draws the
# results. What exists is kept, so the same command goes on after a stop.
#
#   benchmarks/evidence.sh [FOLDER]
#
# FOLDER: of runs and results (runs/evidence). JOBS: models side by side, one core each (2). SEEDS ("0 1 2"). ARMS
# ("mum mae untrained"). PROBE: steps of the linear probes of matching (1000). ARGS: more arguments of the pretraining.
set -euo pipefail
cd "$(dirname "$0")/.."

export FOLDER=${1:-runs/evidence} PYTHON=${PYTHON:-python} PROBE=${PROBE:-1000} ARGS=${ARGS:-} OMP_NUM_THREADS=1
export MOMENTS="2000 4000 8000 12500" # steps of 48 frames
# Of the downstream tasks: whole paths instead of the halves of the pretraining, since poses of few pairs are learnt by heart.
export SCENES="data.scenes.count=240 data.scenes.views=24 data.scenes.size=64 data.image_size=64"

evaluate() { # FOLDER OF RESULTS, TASK, WEIGHTS, NAME, further arguments
  local out="$FOLDER/results/$1" task=$2 weights=$3 name=$4
  shift 4
  compgen -G "$out/$task-*-${name/ /_}${PROTOCOL:+-$PROTOCOL}.json" >/dev/null && return
  "$PYTHON" -m fastmum.evaluate "$task" --weights "$weights" --name "$name" --pictures 0 --out "$out" "$@" >/dev/null
}

correspondence() { # FOLDER OF RESULTS, WEIGHTS, NAME
  evaluate "$1" matching "$2" "$3" --size 64 --steps "$PROBE" --choose-on train
  for task in discriminant cosine attention; do evaluate "$1" "$task" "$2" "$3" --size 64; done
}

downstream() { # WEIGHTS, NAME, SEED
  local run
  evaluate final views "$1" "$2" --size 64
  evaluate final depth "$1" "$2" --size 64 --choose-on train
  for task in recognition segmentation; do evaluate final "$task" "$1" "$2" --size 64; done
  PROTOCOL=matchbench evaluate final matching "$1" "$2" --size 64 --protocol matchbench --choose-on train
  for task in pose roma reconstruction; do # pose is the only one that finetunes the encoder by default
    run="$FOLDER/$task-${2/ /-}"
    # shellcheck disable=SC2046,SC2086
    "$PYTHON" -m fastmum.train --config "configs/${task}_quickstart.yaml" run.dir="$run" run.seed="$3" encoder="$1" \
      model.fallback= train.threads=1 train.picture_every=1000 $SCENES \
      $([ "$task" = pose ] && echo model.finetune=false)
    # shellcheck disable=SC2046
    evaluate final "$task" "$run" "$2" $([ "$task" = roma ] && echo --no-pose) # which takes 20 s a pair on a CPU
  done
}

arm() { # ARM, SEED
  local run="$FOLDER/$1-$2"
  if [ "$1" = untrained ]; then
    run=$run.safetensors
    [ -f "$run" ] ||
      "$PYTHON" -m fastmum.export random:mum_tiny --set patch_size=8 --set seed="$2" --format safetensors --out "$run"
    correspondence final "$run" "$1 $2"
  else
    # shellcheck disable=SC2086
    "$PYTHON" -m fastmum.train --config "configs/evidence/$1.yaml" run.dir="$run" run.seed="$2" $ARGS
    for step in $MOMENTS; do
      correspondence "$step" "$run/checkpoints/$(printf 'step_%07d' "$step")" "$1 $2"
    done
  fi
  downstream "$run" "$1 $2" "$2"
}
export -f evaluate correspondence downstream arm

for seed in ${SEEDS:-0 1 2}; do
  for arm in ${ARMS:-mum mae untrained}; do echo "$arm $seed"; done
done | xargs -P "${JOBS:-2}" -L 1 bash -euo pipefail -c 'arm "$0" "$1"'
last="$FOLDER/results/${MOMENTS##* }"
[ ! -d "$last" ] || cp "$last"/*.json "$FOLDER/results/final"
"$PYTHON" -m fastmum.evaluate.seeds "$FOLDER/results/final" --plots "$FOLDER/plots"
[ ! -d "$last" ] || "$PYTHON" -m fastmum.evaluate.curves "$FOLDER"/results/[0-9]* --plots "$FOLDER/plots"
