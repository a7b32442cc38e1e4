#!/usr/bin/env bash
# A run on your own machines: the same command on every machine.
#
#   1 GPU    torchrun.sh --config mum_vitl16 ...
#   8 GPUs   GPUS=8 torchrun.sh --config mum_vitl16 ...
#   64 GPUs  GPUS=8 NODES=8 HOST=node0 torchrun.sh --config mum_vitl16 data.mode=balanced ...
#
# GPUS: processes on this machine (1). NODES: machines (1). HOST, PORT: first machine, needed if NODES > 1, and its port
# (29500). RESTARTS: how often the processes are restarted from the newest checkpoint after one died (3).
# PYTHON: interpreter; otherwise that of the activated virtual environment, of .venv in this checkout or in the current
# folder, or python3. On SIGTERM or SIGUSR1 the run saves and ends; after GRACE seconds (180) it is killed.
set -euo pipefail

gpus=${GPUS:-1} nodes=${NODES:-1} port=${PORT:-29500} restarts=${RESTARTS:-3} grace=${GRACE:-180}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$grace

PYTHON=${PYTHON:-}
if [ -z "$PYTHON" ]; then
  checkout=$(dirname "${BASH_SOURCE[0]}")/..
  for PYTHON in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$checkout/.venv/bin/python" .venv/bin/python python3; do
    if command -v "$PYTHON" >/dev/null; then break; fi
  done
fi

signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
if [ -z "$(trap -p HUP)" ]; then # nohup ignores it
  signals+=,SIGHUP
fi
if [ "$nodes" -gt 1 ]; then
  : "${HOST:?HOST must name the first machine if NODES is more than 1}"
  meet=(--rdzv-backend=c10d --rdzv-endpoint="$HOST:$port" --rdzv-id=fastmum)
else
  meet=(--standalone)
fi
exec "$PYTHON" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$gpus" --max-restarts="$restarts" \
  --signals-to-handle="$signals" "${meet[@]}" -m fastmum.train "$@"
