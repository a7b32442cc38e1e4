#!/usr/bin/env bash
# A run on machines of one's own: the same line on every machine.
#
#   1 GPU    launch/torchrun.sh --config configs/mum_vitl16.yaml ...
#   8 GPUs   GPUS=8 launch/torchrun.sh --config configs/mum_vitl16.yaml ...
#   64 GPUs  GPUS=8 NODES=8 HOST=node0 launch/torchrun.sh --config configs/mum_vitl16.yaml data.mode=balanced ...
#
# GPUS: processes on this machine (1). NODES: machines (1). HOST: of the first machine, and PORT (29500), where NODES > 1.
# RESTARTS (3): how often the processes are started again after one has died; the run then goes on from its newest
# checkpoint. SIGTERM or SIGUSR1 to this script are handed on: the run saves, within GRACE seconds (180), and ends.
set -euo pipefail

gpus=${GPUS:-1} nodes=${NODES:-1} port=${PORT:-29500} restarts=${RESTARTS:-3} grace=${GRACE:-180}
python=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$grace

if [ "$nodes" -gt 1 ]; then
  : "${HOST:?HOST must name the first machine where NODES is more than 1}"
  meet=(--rdzv-backend=c10d --rdzv-endpoint="$HOST:$port" --rdzv-id=fastmum)
else
  meet=(--standalone)
fi
exec "$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$gpus" --max-restarts="$restarts" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${meet[@]}" -m fastmum.train "$@"
