#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5: train the projector on image-caption pairs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.bash"

MODEL="${MODEL:-lmsys/vicuna-13b-v1.5}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
DATA="${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
IMAGES="${IMAGES:-./playground/data/LLaVA-Pretrain/images}"
OUTPUT="${OUTPUT-./checkpoints/llava-v1.5-13b-pretrain}"
ZERO="${ZERO-$SCRIPTS/zero2.json}"

launch_training \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --output_dir "$OUTPUT" \
    --per_device_train_batch_size 32 \
    --save_steps 24000 \
    --learning_rate 1e-3 \
    "$@"
