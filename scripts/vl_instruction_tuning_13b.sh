#!/usr/bin/env bash
# The chatbot LaVIN-13B from LLaMA: training on Alpaca's instructions and LLaVA's answers about COCO images.
#
# Flags and values are the original's; python -m mma.data.mixture makes all_data.json. The authors used eight A100
# (80 GB); a full run with this code has not been measured. scripts/lavin.bash says what the environment may set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lavin.bash"

OUTPUT="${OUTPUT-./LaVIN-13B-VLIT/}"

train_lavin "torchrun --nproc_per_node 8 --master_port 12345" --llm_model 13B --temperature 5. \
    --batch_size 4 --accum_iter 1 --epochs 15 --warmup_epochs 0.2 --do_pretrain "$@"
