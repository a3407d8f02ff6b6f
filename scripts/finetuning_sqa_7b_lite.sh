#!/usr/bin/env bash
# LaVIN-7B-lite on ScienceQA from LLaMA in 4 bits, on one GPU: training, then accuracy on the test split.
#
# Flags and values are the original's. The authors report 9 GB; a full run with this code has not been measured.
# scripts/lavin.bash says what the environment may set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lavin.bash"

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
OUTPUT="${OUTPUT-./LaVIN-7B-lite/}"
MODEL=(--llm_model 7B --temperature 10.)

train_lavin "torchrun --nproc_per_node 1 --master_port 11111" "${MODEL[@]}" \
    --batch_size 1 --accum_iter 32 --epochs 20 --warmup_epochs 2 \
    --gradient_checkpointing --bits 4bit --cpu_load "$@"

evaluate_lavin "${MODEL[@]}" --bits 4bit --cpu_load True
