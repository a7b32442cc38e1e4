#!/usr/bin/env bash
# A run on a SLURM cluster that survives preemption and time limits: it saves when it is told to end, and is queued again.
#
#   sbatch --nodes=8 launch/slurm.sh --config configs/mum_vitl16.yaml data.manifests=[/data/co3d.arrow] data.mode=balanced
#
# One task a GPU. What the cluster wants besides (--partition, --account, --time) goes on the sbatch line or in here.
#SBATCH --job-name=fastmum
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastmum-%j.log
# Three minutes before the end of the time limit every task gets SIGUSR1: a step, a checkpoint, and exit code 75.
#SBATCH --signal=USR1@180
# A task that fails does not leave the others waiting.
#SBATCH --kill-on-bad-exit=0
set -uo pipefail

requeue_code=75 # REQUEUE of fastmum/engine/stop.py
python=${PYTHON:-python}

# Where rank 0 listens; fastmum would find it by itself, too.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# Threads of torch in each task; the loader's (data.workers) come on top.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Preemption sends SIGTERM to this script as well; it must live until the tasks have saved.
trap 'echo "told to end: waiting for the checkpoint"' TERM USR1

srun --kill-on-bad-exit=0 "$python" -m fastmum.train "$@" &
tasks=$!
wait "$tasks"
code=$?
while kill -0 "$tasks" 2>/dev/null; do # a signal has ended the wait, not the tasks
  wait "$tasks"
  code=$?
done

if [ "$code" -eq "$requeue_code" ]; then
  echo "saved; queued again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
