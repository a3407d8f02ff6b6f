#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with LoRA.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.bash"

MODEL="${MODEL:-lmsys/vicuna-13b-v1.5}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
PROJECTOR="${PROJECTOR:-./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin}"
DATA="${DATA:-./playground/data/llava_v1_5_mix665k.json}"
IMAGES="${IMAGES:-./playground/data}"
OUTPUT="${OUTPUT-./checkpoints/llava-v1.5-13b-lora}"
ZERO="${ZERO-$SCRIPTS/zero3.json}"

launch_training \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --mm_projector_type mlp2x_gelu \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --output_dir "$OUTPUT" \
    --save_steps 50000 \
    --learning_rate 2e-4 \
    "$@"
