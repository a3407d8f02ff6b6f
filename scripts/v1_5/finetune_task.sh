#!/usr/bin/env bash
# Continue from a finished LLaVA-1.5 on data of your own, all weights of the language model.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.bash"

MODEL="${MODEL:-liuhaotian/llava-v1.5-13b}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
DATA="${DATA:-./playground/data/llava_v1_5_mix665k.json}"
IMAGES="${IMAGES:-./playground/data}"
OUTPUT="${OUTPUT-./checkpoints/llava-v1.5-13b-task}"
ZERO="${ZERO-$SCRIPTS/zero3.json}"

launch_training \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --output_dir "$OUTPUT" \
    --save_steps 50000 \
    --learning_rate 2e-5 \
    "$@"
