#!/usr/bin/env bash
# Fine-tune the first LLaVA on ScienceQA: twelve epochs of lectures and explanations (QCM-LEA).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

PROMPT_VERSION="${PROMPT_VERSION:-v1}"
MODEL="${MODEL:-lmsys/vicuna-13b-v1.3}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14}"
PROJECTOR="${PROJECTOR:-./checkpoints/huggingface/liuhaotian/llava-pretrain-vicuna-13b-v1.3/mm_projector.bin}"
DATA="${DATA:-/Data/ScienceQA/data/scienceqa/llava_train_QCM-LEA.json}"
IMAGES="${IMAGES:-/Data/ScienceQA/data/scienceqa/images/train}"
OUTPUT="${OUTPUT-./checkpoints/llava-vicuna-13b-v1.3-pretrain_lcs558k_plain-ScienceQA_QCM_LEA-12e}"
ZERO="${ZERO-$SCRIPTS/zero2.json}"

launch_training \
    --model_name_or_path "$MODEL" \
    --version "$PROMPT_VERSION" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --output_dir "$OUTPUT" \
    --num_train_epochs 12 \
    --save_steps 50000 \
    --learning_rate 2e-5 \
    "$@"
