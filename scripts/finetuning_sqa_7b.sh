#!/usr/bin/env bash
# LaVIN-7B on ScienceQA from LLaMA: training, then the accuracy on the test split.
#
# Flags and values are the original's. The authors used two A100; a full run with this code has not been measured.
# scripts/lavin.bash says what the environment may set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lavin.bash"

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0,1}"
OUTPUT="${OUTPUT-./LaVIN-7B/}"
MODEL=(--llm_model 7B --temperature 10.)

train_lavin "torchrun --nproc_per_node 2 --master_port 11111" "${MODEL[@]}" \
    --batch_size 4 --accum_iter 4 --epochs 20 --warmup_epochs 2 "$@"

evaluate_lavin "${MODEL[@]}"
