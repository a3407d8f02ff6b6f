#!/usr/bin/env bash
# Fine-tune LLaVA-1.5 with MLLM-HydraLoRA: LoRA on the attention projections, routed MLP blocks in every decoder layer.
#
# The command of the original's README with its flags and values. Needs the three checkpoints and the data named below.
# Hardware: written for one GPU with bf16; neither memory nor time of a full run has been measured with this code.
#
# Paths and program come from the environment, further flags are appended and win over those below:
#   MODEL=/data/llava-v1.5-7b OUTPUT=./out bash scripts/MLLM_HydraLoRA.sh --max_steps 10
set -euo pipefail

MODEL="${MODEL:-./checkpoints/llava-v1.5-7b}"
VISION_TOWER="${VISION_TOWER:-./checkpoints/clip-vit-large-patch14-336}"
PROJECTOR="${PROJECTOR:-$MODEL/mm_projector.bin}"
DATA="${DATA:-./playground/data/llava_v1_5_mix665k.json}"
IMAGES="${IMAGES:-./playground/data}"
OUTPUT="${OUTPUT-./checkpoints/llava-v1.5-7b-lora-mohle}"
: "${OUTPUT:?is set and empty: name a folder, or unset it to have the folder of the script}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"

"${PYTHON:-python}" -m llava.train.train_mem \
    --use_lora True --lora_rank 32 --lora_alpha 64 --mm_projector_lr 2e-5 \
    --llm_moe True --dense_moe True --lora_modules q_proj,k_proj,v_proj,o_proj --llm_moe_num_experts 3 --moe_balance_w 0.05 \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --freeze_backbone True \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio resize \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 2 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 1000 \
    --save_total_limit 1 \
    --learning_rate 2e-4 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 False \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 2 \
    --lazy_preprocess True \
    "$@"
