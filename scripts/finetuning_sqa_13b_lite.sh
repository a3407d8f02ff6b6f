#!/usr/bin/env bash
# LaVIN-13B-lite on ScienceQA from LLaMA in 4 bits, on one GPU: training, then accuracy on the test split.
#
# Flags and values are the original's. The authors report 14 GB; a full run with this code has not been measured.
# scripts/lavin.bash says what the environment may set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lavin.bash"

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
OUTPUT="${OUTPUT-./LaVIN-13B-lite/}"
MODEL=(--llm_model 13B --temperature 5.)

train_lavin "torchrun --nproc_per_node 1" "${MODEL[@]}" \
    --batch_size 1 --accum_iter 32 --epochs 20 --warmup_epochs 2 \
    --gradient_checkpointing --bits 4bit --cpu_load "$@"

evaluate_lavin "${MODEL[@]}" --bits 4bit
