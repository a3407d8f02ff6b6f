# What all training scripts share: upstream's common flags, and how processes are started. Sourced, never run.
#
#   LAUNCHER  the program that starts training (default: deepspeed), for example "torchrun --nproc_per_node 8",
#             "accelerate launch", "deepspeed --hostfile scripts/hostfile", or "python" for one process
#   ZERO      DeepSpeed's configuration file; empty: plain data parallelism
#
# Run the scripts from the root of the repository. Flags given to a script are appended and win over its own.
set -euo pipefail

launch_training() {
    local launcher zero=()
    read -ra launcher <<<"${LAUNCHER:-deepspeed}"
    if [[ -n "${ZERO-}" ]]; then zero=(--deepspeed "$ZERO"); fi
    "${launcher[@]}" llava/train/train_mem.py \
        ${zero[@]+"${zero[@]}"} \
        --mm_vision_select_layer -2 \
        --mm_use_im_start_end False \
        --mm_use_im_patch_token False \
        --bf16 True \
        --num_train_epochs 1 \
        --per_device_train_batch_size 16 \
        --per_device_eval_batch_size 4 \
        --gradient_accumulation_steps 1 \
        --evaluation_strategy "no" \
        --save_strategy "steps" \
        --save_total_limit 1 \
        --weight_decay 0. \
        --warmup_ratio 0.03 \
        --lr_scheduler_type "cosine" \
        --logging_steps 1 \
        --tf32 True \
        --model_max_length 2048 \
        --gradient_checkpointing True \
        --dataloader_num_workers 4 \
        --lazy_preprocess True \
        --report_to wandb \
        "$@"
}
