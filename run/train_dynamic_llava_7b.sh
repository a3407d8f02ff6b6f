#!/usr/bin/env bash
# Train Dynamic-LLaVA-7B from LLaVA-1.5-7B: predictors that drop vision and text tokens, and the model along with them.
#
# The command of the original's README with its flags and values; those that all scripts share stand in
# scripts/common.bash. Needs the two checkpoints and the data named below.
# Hardware: the authors used 8 GPUs of 80 GB; with fewer, lower --per_device_train_batch_size and raise
# --gradient_accumulation_steps so that their product with the number of GPUs stays 64. A full run with this code has
# not been measured.
#
# Paths come from the environment, further flags are appended and win over those below:
#   MODEL=/data/llava-v1.5-7b bash run/train_dynamic_llava_7b.sh --max_steps 10
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.bash"

MODEL="${MODEL:-./checkpoints/llava-v1.5-7b}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
DATA="${DATA:-./playground/data/llava_v1_5_mix665k.json}"
IMAGES="${IMAGES:-./playground/data}"
OUTPUT="${OUTPUT-./results/dynamic-llava-7b}"
ZERO="${ZERO-$SCRIPTS/zero3.json}"
TRAIN_PROGRAM=llava.train.train_sparse

launch_training \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --image_aspect_ratio pad \
    --group_by_modality_length False \
    --requires_image True \
    --output_dir "$OUTPUT" \
    --per_device_train_batch_size 8 \
    --save_steps 40000 \
    --learning_rate 5e-6 \
    --predictor_lr 2e-4 \
    --predictor_weight_decay 0. \
    --mask_loss_weight 100.0 \
    --gumbel_start_tau 1.0 \
    --gumbel_end_tau 0.1 \
    --use_vision_predictor True \
    --use_text_predictor True \
    --use_output_text_predictor True \
    --use_instruct_predictor False \
    --vision_keep_rate 0.2 \
    --output_text_keep_rate 0.5 \
    --output_text_len_for_training 50 \
    "$@"
