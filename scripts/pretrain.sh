#!/usr/bin/env bash
# Stage 1 of the first LLaVA: train the projector on image-caption pairs. Not for LLaVA-1.5 (see scripts/v1_5).
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

launch_training \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --tune_mm_mlp_adapter True \
    --output_dir "$OUTPUT" \
    --save_steps 24000 \
    --learning_rate 2e-3 \
    "$@"
