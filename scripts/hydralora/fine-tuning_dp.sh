#!/usr/bin/env bash
# Fine-tune a language model on instructions with HydraLoRA, on four GPUs with DeepSpeed ZeRO-3 and
# offloading. Flags and values are the original's.
#
# Paths come from the environment, further flags are appended and win over those below:
#   MODEL=/data/llama-2-7b DATA=./my_data OUTPUT=./out GPUS=8 bash scripts/hydralora/fine-tuning_dp.sh --lora_nums 6
set -euo pipefail

MODEL="${MODEL:-path_to_llama_model}"
TOKENIZER="${TOKENIZER:-$MODEL}"
DATA="${DATA:-data/example_data}"
VALIDATION="${VALIDATION:-$DATA/test.json}"
OUTPUT="${OUTPUT:-path_to_output/lora_model}"
ZERO="${ZERO:-./scripts/hydralora/ds_zero3_offload.json}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0,1,2,3}"

torchrun --nnodes 1 --nproc_per_node "${GPUS:-4}" --node_rank 0 --master_port "${PORT:-29502}" \
    -m hydralora.finetune \
    --deepspeed "$ZERO" \
    --model_name_or_path "$MODEL" \
    --tokenizer_name_or_path "$TOKENIZER" \
    --dataset_dir "$DATA" \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --do_train \
    --do_eval \
    --seed 41 \
    --bf16 \
    --num_train_epochs 1 \
    --lr_scheduler_type cosine \
    --learning_rate 0.0002 \
    --warmup_ratio 0.03 \
    --weight_decay 0 \
    --logging_strategy steps \
    --logging_steps 10 \
    --save_strategy steps \
    --save_total_limit 5 \
    --evaluation_strategy steps \
    --eval_steps 5000 \
    --save_steps 5000 \
    --gradient_accumulation_steps 8 \
    --preprocessing_num_workers 8 \
    --max_seq_length 1024 \
    --output_dir "$OUTPUT" \
    --ddp_timeout 30000 \
    --logging_first_step True \
    --lora_rank 4 \
    --lora_alpha 32 \
    --lora_nums 4 \
    --trainable gate_proj,down_proj,up_proj \
    --lora_dropout 0.05 \
    --torch_dtype bfloat16 \
    --validation_file "$VALIDATION" \
    --load_in_kbits 16 \
    --ddp_find_unused_parameters False \
    --overwrite_output_dir \
    "$@"
