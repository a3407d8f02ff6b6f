#!/usr/bin/env bash
# scripts/pretrain.sh for GPUs without bf16, TF32 and FlashAttention: float32, smaller batches that are accumulated.
# Llama 2: MODEL_VERSION=llama-2-7b-chat.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

MODEL_VERSION="${MODEL_VERSION:-vicuna-v1-3-7b}"
MODEL="${MODEL:-./checkpoints/$MODEL_VERSION}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14}"
DATA="${DATA:-/path/to/pretrain_data.json}"
IMAGES="${IMAGES:-/path/to/images}"
OUTPUT="${OUTPUT-./checkpoints/llava-$MODEL_VERSION-pretrain}"
ZERO="${ZERO-$SCRIPTS/zero2.json}"
TRAIN_PROGRAM=llava.train.train_xformers

launch_training \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --tune_mm_mlp_adapter True \
    --bf16 False \
    --output_dir "$OUTPUT" \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --save_steps 24000 \
    --learning_rate 2e-3 \
    --tf32 False \
    "$@"
