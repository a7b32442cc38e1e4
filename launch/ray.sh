#!/usr/bin/env bash
# A command on data or images over all nodes of a SLURM job, on a Ray cluster that lasts as long as the command.
#
#   sbatch --nodes=8 ray.sh data build co3d --root /lustre/co3d --out /lustre/lists/co3d.arrow
#   sbatch --nodes=8 ray.sh data pack /lustre/lists/co3d.arrow --out /lustre/packed --short-side 320
#   sbatch --nodes=8 --gpus-per-node=8 ray.sh features /lustre/photos --weights /lustre/mum.pth --out /lustre/photos.npz
#
# Paths must be on file systems that all nodes share, and so must the Python environment. A lost node's work is done
# again by the others; without the first node the job fails, and the same command goes on with `pack`'s shards.
# PYTHON: interpreter; otherwise that of the activated virtual environment, of .venv in the folder of sbatch, or
# python3.
#SBATCH --job-name=fastmum-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --output=fastmum-ray-%j.log
set -euo pipefail

PYTHON=${PYTHON:-}
if [ -z "$PYTHON" ]; then
  for PYTHON in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" .venv/bin/python python3; do
    if command -v "$PYTHON" >/dev/null; then break; fi
  done
fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # `head` would end scontrol by SIGPIPE
port=$((20000 + SLURM_JOB_ID % 20000))
# Whoever reaches a Ray cluster can run code on it, so this one has a secret of its own; and a folder of its own on each
# node, whose path must be short.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=${RAY_TMPDIR:-/tmp/fastmum-ray-$SLURM_JOB_ID}
export PYTHON head port cpus="${SLURM_CPUS_PER_TASK:-1}"

# Ray on every node until the command ends. srun takes neither --cpus-per-task nor, after sbatch --export=NONE, the
# environment from sbatch in all versions. A lost node must not end the others.
start='mkdir -p "$RAY_TMPDIR"
where=--address=$head:$port
if [ "$SLURM_NODEID" -eq 0 ]; then where="--head --port=$port --include-dashboard=false"; fi
exec "$PYTHON" -m ray.scripts.scripts start --block --num-cpus="$cpus" $where'
log=fastmum-ray-$SLURM_JOB_ID.nodes.log
srun --export=ALL --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=0 bash -c "$start" >"$log" 2>&1 &
cluster=$!
trap 'kill "$cluster" 2>/dev/null || true; wait "$cluster" || true' EXIT
until (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do
  kill -0 "$cluster" 2>/dev/null || { echo "Ray did not start: see $log" >&2; exit 1; }
  sleep 1
done
"$PYTHON" -m fastmum.cli "$@" --ray "$head:$port"
