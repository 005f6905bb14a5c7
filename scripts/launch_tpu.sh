#!/usr/bin/env bash
# Trains on a Cloud TPU slice: the same command on every worker, from this machine.
#
#   TPU=my-tpu ZONE=us-east5-a [PROJECT=...] [REPO=https://...] [BRANCH=main] \
#       scripts/launch_tpu.sh configs/4m7_xl.py --workdir gs://bucket/runs/4m7_xl --data-dir /mnt/data
#
# WORKDIR and the data must be where all workers see them (a bucket mounted with gcsfuse, or a Filestore). A preempted
# slice goes on from its last checkpoint when the same command is given again. DRY_RUN=1 prints what would be run.
set -euo pipefail

if [ $# -lt 1 ] || [ "${1:-}" = "-h" ] || [ "${1:-}" = "--help" ]; then
    sed -n '2,9p' "$0" | cut -c3-
    exit $(($# < 1 ? 2 : 0))
fi
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"
repo=${REPO:-$(git config --get remote.origin.url || true)}
: "${repo:?set REPO to the address that the workers clone}"
branch=${BRANCH:-main}

command=$(
    printf 'set -e; [ -d m4 ] || git clone --quiet --branch %q %q m4; cd m4; git pull --quiet; ' "$branch" "$repo"
    printf '[ -d .venv ] || python3 -m venv .venv; . .venv/bin/activate; pip install --quiet -e ".[tpu]"; '
    printf 'JAX_COMPILATION_CACHE_DIR=$HOME/.cache/m4_jax exec python train.py'
    printf ' %q' "$@"
)
ssh=(gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all ${PROJECT:+--project "$PROJECT"} --command "$command")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${ssh[@]}"
    echo
else
    exec "${ssh[@]}"
fi
