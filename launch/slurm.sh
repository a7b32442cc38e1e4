#!/usr/bin/env bash
# A run on a SLURM cluster that survives preemption and time limits: it saves on a signal and is queued again.
#
#   sbatch --nodes=8 slurm.sh --config configs/mum_vitl16.yaml data.manifests=[/data/co3d.arrow] data.mode=balanced
#
# One task per GPU. Put what your cluster needs (--partition, --account, --time) on the sbatch line or in here.
#SBATCH --job-name=fastmum
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastmum-%j.log
# 180 s before the time limit every task gets SIGUSR1: it ends its step, saves, and exits with 75.
#SBATCH --signal=USR1@180
# The other tasks detect a failed one and exit; SLURM need not kill them.
#SBATCH --kill-on-bad-exit=0
set -uo pipefail

requeue_code=75 # REQUEUE in fastmum/engine/stop.py
python=${PYTHON:-python}

# Address of rank 0; fastmum uses the same defaults.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# Threads of torch per task, in addition to those of the loader (data.workers).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Preemption sends SIGTERM to this script too; it must not exit before the tasks have saved.
trap 'echo "signal received: waiting for the checkpoint"' TERM USR1

srun --kill-on-bad-exit=0 "$python" -m fastmum.train "$@" &
tasks=$!
wait "$tasks"
code=$?
while kill -0 "$tasks" 2>/dev/null; do # a signal interrupted the wait; the tasks still run
  wait "$tasks"
  code=$?
done

if [ "$code" -eq "$requeue_code" ]; then
  echo "saved; the job is queued again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
