#!/usr/bin/env bash
# Makes an environment for every version of torch and Python that fastmum supports, and runs kernels in Triton's
# interpreter, attention, compilation and three training steps there. Takes about 15 minutes and 6 GB a version.
#
#   tests/versions.sh [TORCH:PYTHON[:REQUIREMENT]...]
#
# REQUIREMENT: one more package, such as numpy==2.3.5 for the interpreter of Triton 3.6. FOLDER: of the environments and
# of results.tsv, one line a version (runs/versions). Versions that are in results.tsv are not run again. KEEP=1 keeps
# environments. Ends with 1 if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."

FOLDER=${FOLDER:-runs/versions}
DEFAULT="2.10.0:3.11:numpy==2.3.5 2.11.0:3.12:numpy==2.3.5 2.13.0:3.13 2.14.1:3.12 2.14.1:3.13 2.15.0:3.11"
STAGES=(install kernels attention compile train)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=""

stage() { # NAME: one stage in the environment $venv
  local python="$venv/bin/python"
  case $1 in
    install)
      "$(find_python "$version")" -m venv "$venv" &&
        "$python" -m pip install -q "torch==$torch" ${requirement:+"$requirement"} -e . pytest hypothesis h5py ;;
    kernels) TRITON_INTERPRET=1 "$python" -m pytest -q -p no:cacheprovider tests/kernels -m "not slow" ;;
    attention) "$python" -m pytest -q -p no:cacheprovider tests/attention -m "not slow" ;;
    compile) "$python" -m pytest -q -p no:cacheprovider tests/model/test_compile.py tests/engine/test_fp8.py ;;
    train)
      "$python" -m fastmum.train --config configs/quickstart.yaml run.dir="$venv/run" train.steps=3 train.log_every=1 \
        data.scenes.count=6 model.compile=block ;;
  esac
}

find_python() { # VERSION: its interpreter, of the PATH or of pyenv
  local found
  if found=$(command -v "python$1") && "$found" -c "" 2>/dev/null; then
    echo "$found"
  else
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python 2>/dev/null | tail -n 1 | grep . || echo "python$1"
  fi
}

mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd) failed=0
for what in ${*:-$DEFAULT}; do
  IFS=: read -r torch version requirement <<<"$what"
  name="torch-$torch-python-$version" venv="$FOLDER/torch-$torch-python-$version"
  grep -q "^$name	" "$FOLDER/results.tsv" 2>/dev/null && continue
  row=$name
  for one in "${STAGES[@]}"; do
    if stage "$one" >"$FOLDER/$name-$one.log" 2>&1; then
      row+="	$one ok $(grep -oE '[0-9]+ passed' "$FOLDER/$name-$one.log" | tail -n 1)"
    else
      row+="	$one FAILED $(grep -oE '[0-9]+ (failed|errors?)' "$FOLDER/$name-$one.log" | tail -n 1)" failed=1
    fi
    echo "$name: ${row##*	}"
  done
  echo "$row" >>"$FOLDER/results.tsv"
  [ -n "${KEEP:-}" ] || rm -rf "$venv"
done
exit $failed
