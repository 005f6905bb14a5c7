#!/usr/bin/env bash
# Trains on GPU nodes under Slurm, one process a GPU:
#
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 scripts/launch_slurm.sh configs/4m7_xl.py --mesh.fsdp 32
#
# JAX finds the job's processes by Slurm's variables. Slurm's notice before the time limit (--signal) saves a checkpoint,
# and the job puts itself into the queue again; it goes on from there. VENV: a virtual environment with ".[cuda]".
#SBATCH --job-name=m4
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ $# -lt 1 ] || [ "${1:-}" = "-h" ] || [ "${1:-}" = "--help" ]; then
    sed -n '2,7p' "$0" | cut -c3-
    exit $(($# < 1 ? 2 : 0))
fi
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -z "${VENV:-}" ] || . "$VENV/bin/activate"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}
# Collectives overlap with computation.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"

status=0
srun --kill-on-bad-exit=1 python train.py "$@" || status=$?
if [ "$status" = 0 ] && [ -n "${SLURM_JOB_ID:-}" ] && tail -n 20 "${SLURM_JOB_NAME:-m4}-$SLURM_JOB_ID.log" 2>/dev/null |
    grep -q "stopped by SIGTERM"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
