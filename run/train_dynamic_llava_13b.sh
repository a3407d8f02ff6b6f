#!/usr/bin/env bash
# Train Dynamic-LLaVA-13B from LLaVA-1.5-13B: predictors that drop vision and text tokens, and the model along with them.
#
# The command of the original's README with its flags and values. Needs the two checkpoints and the data named below.
# Hardware: the authors used 8 GPUs of 80 GB; with fewer, lower --per_device_train_batch_size and raise
# --gradient_accumulation_steps so that their product with the number of GPUs stays 64. A full run with this code has
# not been measured.
#
# Paths come from the environment, further flags are appended and win over those below:
#   MODEL=/data/llava-v1.5-13b bash run/train_dynamic_llava_13b.sh --max_steps 10
set -euo pipefail

MODEL="${MODEL:-./checkpoints/llava-v1.5-13b}"
VISION_TOWER="${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
DATA="${DATA:-./playground/data/llava_v1_5_mix665k.json}"
IMAGES="${IMAGES:-./playground/data}"
OUTPUT="${OUTPUT:-./results/dynamic-llava-13b}"
read -ra LAUNCH <<<"${LAUNCHER:-deepspeed}"

"${LAUNCH[@]}" llava/train/train_sparse.py \
    --deepspeed "${ZERO:-./scripts/zero3.json}" \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length False \
    --requires_image True \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1.0 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 40000 \
    --save_total_limit 1 \
    --learning_rate 5e-6 \
    --weight_decay 0. \
    --predictor_lr 2e-4 \
    --predictor_weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to wandb \
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
