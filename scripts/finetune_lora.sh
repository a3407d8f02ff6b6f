#!/usr/bin/env bash
# Stage 2 of the first LLaVA with LoRA. Not for LLaVA-1.5 (see scripts/v1_5).
# Llama 2: MODEL_VERSION=llama-2-7b-chat PROMPT_VERSION=llava_llama_2.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

MODEL_VERSION="${MODEL_VERSION:-vicuna-v1-3-7b}"
PROMPT_VERSION="${PROMPT_VERSION:-v1}"
MODEL="${MODEL:-./checkpoints/$MODEL_VERSION}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14}"
PROJECTOR="${PROJECTOR:-./checkpoints/llava-$MODEL_VERSION-pretrain/mm_projector.bin}"
DATA="${DATA:-./playground/data/llava_instruct_80k.json}"
IMAGES="${IMAGES:-/path/to/coco/train2017}"
OUTPUT="${OUTPUT-./checkpoints/llava-$MODEL_VERSION-finetune_lora}"
ZERO="${ZERO-$SCRIPTS/zero2.json}"

launch_training \
    --lora_enable True \
    --model_name_or_path "$MODEL" \
    --version "$PROMPT_VERSION" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --output_dir "$OUTPUT" \
    --save_steps 50000 \
    --learning_rate 2e-5 \
    "$@"
