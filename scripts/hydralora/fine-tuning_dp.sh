#!/usr/bin/env bash
# fine-tuning.sh on several GPUs with DeepSpeed ZeRO-3 and offloading, with the original's flags and values.
#
# One process for each GPU of CUDA_VISIBLE_DEVICES; where that is not set, four, as in the original. GPUS names another number.
#   GPUS=8 MODEL=/data/llama-2-7b DATA=./my_data OUTPUT=./out bash scripts/hydralora/fine-tuning_dp.sh
set -euo pipefail

IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES-0,1,2,3}"
GPUS="${GPUS:-${#visible[@]}}"
export LAUNCHER="${LAUNCHER:-torchrun --nnodes 1 --nproc_per_node $GPUS --node_rank 0 --master_port ${PORT:-29502}}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/fine-tuning.sh" \
    --deepspeed "${ZERO:-$(dirname "${BASH_SOURCE[0]}")/ds_zero3_offload.json}" \
    --preprocessing_num_workers 8 \
    --ddp_timeout 30000 \
    --ddp_find_unused_parameters False \
    "$@"
