#!/usr/bin/env bash
# Trains on a SLURM cluster. On preemption or at the time limit the run saves a checkpoint, and the job is requeued.
#
#   sbatch --nodes=8 slurm.sh --config mum_vitl16 data.manifests=[/data/co3d.arrow] data.mode=balanced
#
# One task per GPU. Pass options of the cluster (--partition, --account, --time) to sbatch, or add them here.
#SBATCH --job-name=fastmum
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastmum-%j.log
# Three minutes before the time limit every task gets SIGUSR1, finishes its step, saves, and exits with code 75.
#SBATCH --signal=USR1@180
# A failed task does not kill the others before they have saved.
#SBATCH --kill-on-bad-exit=0
set -uo pipefail

requeue_code=75 # REQUEUE of fastmum/engine/stop.py
python=${PYTHON:-python}

# Address of rank 0; without these variables fastmum derives it from SLURM's.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# Threads of torch in each task, without those of the loader (data.workers).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Preemption sends SIGTERM to this script as well; it must outlive the tasks.
trap 'echo "signal received: waiting for the checkpoint"' TERM USR1

srun --kill-on-bad-exit=0 "$python" -m fastmum.train "$@" &
tasks=$!
wait "$tasks"
code=$?
while kill -0 "$tasks" 2>/dev/null; do # a signal ended the wait, not the tasks
  wait "$tasks"
  code=$?
done

if [ "$code" -eq "$requeue_code" ]; then
  echo "saved; requeued"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
