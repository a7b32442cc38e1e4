#!/usr/bin/env bash
# A run on a SLURM cluster that survives preemption and time limits: it saves on a signal and is queued again.
#
#   sbatch --nodes=8 slurm.sh --config mum_vitl16 data.manifests=[/data/co3d.arrow] data.mode=balanced
#
# One task per GPU. Put what your cluster needs (--partition, --account, --time) on the sbatch line or in here.
# MODULES: environment modules to load ("cuda/12.8 python/3.12"). PYTHON: interpreter; otherwise that of the activated
# virtual environment, of .venv in the folder of sbatch, or python3.
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

requeue_code=75 # REQUEUE in fastmum/engine/stop.py

if [ -n "${MODULES:-}" ]; then
  if ! command -v module >/dev/null; then # a batch script is no login shell
    for file in /etc/profile.d/*mod*.sh; do . "$file"; done
  fi
  module load $MODULES || exit
fi
set -uo pipefail

PYTHON=${PYTHON:-}
if [ -z "$PYTHON" ]; then
  for PYTHON in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" .venv/bin/python python3; do
    if command -v "$PYTHON" >/dev/null; then break; fi
  done
fi

# Address of rank 0; fastmum uses the same defaults.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# Threads of torch per task, in addition to those of the loader (data.workers).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Preemption sends SIGTERM to this script too; it must not exit before the tasks have saved.
trap 'echo "signal received: waiting for the checkpoint"' TERM USR1

# srun takes --cpus-per-task from sbatch only in some versions, and no environment after sbatch --export=NONE. The other
# tasks detect a failed one and exit; SLURM need not kill them.
srun --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 "$PYTHON" -m fastmum.train "$@" &
tasks=$!
wait "$tasks"
code=$?
while kill -0 "$tasks" 2>/dev/null; do # a signal interrupted the wait; the tasks still run
  wait "$tasks"
  code=$?
done

# RUNNING: signalled before the time limit or preemption. A job that scancel ended has none of the three.
again='JobState=RUNNING|PreemptTime=[0-9]|Reason=TimeLimit'
if [ "$code" -eq "$requeue_code" ] && [[ $(scontrol show job "$SLURM_JOB_ID") =~ $again ]]; then
  echo "saved; the job is queued again"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
