#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 on several machines under Slurm: one torchrun per machine, ZeRO-3 over all of them.
#
#   sbatch --nodes 4 scripts/slurm_finetune.sh --num_train_epochs 1
#
# MODEL, VISION_TOWER, PROJECTOR, DATA, IMAGES, OUTPUT and ZERO as in scripts/v1_5/finetune.sh, on a file system that all
# machines share. A job that is requeued, with the same number of machines or another, goes on from its last checkpoint.
#SBATCH --job-name=llava-finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

GPUS="${SLURM_GPUS_ON_NODE:-8}"
NODES="${SLURM_NNODES:-1}"
FIRST="${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1 || true)}"
PORT="${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}"

# No restarts by torchrun: a machine that is lost ends the job with an error, and Slurm requeues it as a whole.
export LAUNCHER="torchrun --nnodes $NODES --nproc_per_node $GPUS --max_restarts 0 --rdzv_backend c10d \
    --rdzv_id ${SLURM_JOB_ID:-0} --rdzv_endpoint ${FIRST:-localhost}:$PORT"

# sbatch runs a copy of this file that lies elsewhere; the job starts in the folder it was submitted from.
SCRIPTS="$(dirname -- "${BASH_SOURCE[0]}")"
if [[ ! -f "$SCRIPTS/v1_5/finetune.sh" ]]; then SCRIPTS=scripts; fi

run=(bash "$SCRIPTS/v1_5/finetune.sh" "$@")
if [[ -n "${SLURM_JOB_ID-}" ]]; then run=(srun --kill-on-bad-exit=1 "${run[@]}"); fi
"${run[@]}"
