#!/usr/bin/env bash
# Fine-tune a language model on instructions with HydraLoRA, on one GPU. Flags and values are the original's.
#
# The GPU is the one that is visible; of several, CUDA_VISIBLE_DEVICES chooses one, or fine-tuning_dp.sh takes all.
# The default data, data/example_data next to this file, are 112 records that `python -m playground.instructions` wrote.
# Paths come from the environment, further flags are appended and win over those below:
#   MODEL=/data/llama-2-7b DATA=./my_data OUTPUT=./out bash scripts/hydralora/fine-tuning.sh --lora_nums 6
set -euo pipefail

MODEL="${MODEL:-path_to_llama_model}"
TOKENIZER="${TOKENIZER:-$MODEL}"
HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)"
DATA="${DATA:-$HERE/data/example_data}"
VALIDATION="${VALIDATION:-$DATA/test.json}"
OUTPUT="${OUTPUT-path_to_output/lora_model}"
: "${OUTPUT:?is set and empty: name a folder, or unset it to have the folder of the script}"

read -ra launcher <<<"${LAUNCHER:-${PYTHON:-python}}"

"${launcher[@]}" -m hydralora.finetune \
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
    --max_seq_length 1024 \
    --output_dir "$OUTPUT" \
    --logging_first_step True \
    --lora_rank 4 \
    --lora_alpha 32 \
    --lora_nums 4 \
    --trainable gate_proj,down_proj,up_proj \
    --lora_dropout 0.05 \
    --torch_dtype bfloat16 \
    --validation_file "$VALIDATION" \
    --load_in_kbits 16 \
    --overwrite_output_dir \
    "$@"
