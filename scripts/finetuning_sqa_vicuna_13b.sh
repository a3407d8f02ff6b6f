#!/usr/bin/env bash
# LaVIN-13B on ScienceQA from Vicuna: training, then the accuracy on the test split.
#
# Flags and values are the original's. The authors used eight A100 (80 GB); a full run with this code has not been
# measured. scripts/lavin.bash says what the environment may set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lavin.bash"

OUTPUT="${OUTPUT-./LaVIN-Vicuna-13B/}"
MODEL=(--llm_model 13B --use_vicuna --temperature 5.)

train_lavin "torchrun --nproc_per_node 8 --master_port 12345" "${MODEL[@]}" \
    --batch_size 4 --accum_iter 1 --epochs 20 --warmup_epochs 2 "$@"

evaluate_lavin "${MODEL[@]}"
