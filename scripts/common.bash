# What all training and evaluation scripts share: common flags, and how processes are started. Sourced, never run.
#
#   LAUNCHER  the program that starts training (default: deepspeed), for example "torchrun --nproc_per_node 8",
#             "accelerate launch", "deepspeed --hostfile scripts/hostfile", or "python" for one process
#   ZERO      DeepSpeed's configuration file; empty: plain data parallelism
#
# TRAIN_PROGRAM is set by the scripts that train by another program than llava/train/train_mem.py.
#
# Run the scripts from the root of the repository. Flags given to a script are appended and win over its own.
set -euo pipefail

launch_training() {
    local launcher zero=()
    read -ra launcher <<<"${LAUNCHER:-deepspeed}"
    if [[ -n "${ZERO-}" ]]; then zero=(--deepspeed "$ZERO"); fi
    "${launcher[@]}" "${TRAIN_PROGRAM:-llava/train/train_mem.py}" \
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

# What the evaluation scripts share. From the environment:
#
#   MODEL, MODEL_BASE     checkpoint, and its base where it holds only adapters or a projector
#   CKPT                  name of the model in file names (default: the last part of MODEL)
#   EVAL                  folder of the benchmarks (default: ./playground/data/eval)
#   PROGRAMS              llava.eval, or llava.dynamic_eval for the names of Dynamic-LLaVA (default: llava.eval)
#   CONV_MODE, BATCH_SIZE conversation template (default: the script's), questions answered together (default: auto)
#   CUDA_VISIBLE_DEVICES  one process for each of these GPUs (default: 0); empty: one process without a GPU
#   PYTHON                the interpreter (default: python)
evaluation_settings() {
    MODEL="${MODEL:-liuhaotian/llava-v1.5-13b}"
    MODEL="${MODEL%/}"
    CKPT="${CKPT:-${MODEL##*/}}"
    EVAL="${EVAL:-./playground/data/eval}"
    PROGRAMS="${PROGRAMS:-llava.eval}"
    PYTHON="${PYTHON:-python}"
}

# answer_in_chunks MERGED PROGRAM FLAGS...: each GPU answers a chunk of the questions, then the chunks are put together
# in MERGED. Chunks lie beside a MERGED called merge.jsonl, otherwise in a folder of MERGED's name. If a chunk fails, so
# does the script, and MERGED stays as it was; the same command again asks only what has no answer yet.
answer_in_chunks() {
    local merged="$1" program="$2" folder gpus index pids=() failed=() parts=() base=()
    shift 2
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-0}"
    if ((${#gpus[@]} == 0)); then gpus=(""); fi
    if [[ -n "${MODEL_BASE-}" ]]; then base=(--model-base "$MODEL_BASE"); fi
    folder="${merged%.jsonl}"
    if [[ "${merged##*/}" == merge.jsonl ]]; then folder="$(dirname "$merged")"; fi
    mkdir -p "$folder"
    # Processes in the background do not hear an interrupt from the keyboard.
    trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM
    for index in "${!gpus[@]}"; do
        parts+=("$folder/${#gpus[@]}_$index.jsonl")
        # shellcheck disable=SC2086  # "llava.eval chartqa" is a program and its first argument
        CUDA_VISIBLE_DEVICES="${gpus[index]}" "$PYTHON" -m $program \
            --model-path "$MODEL" ${base[@]+"${base[@]}"} \
            --answers-file "${parts[index]}" \
            --num-chunks "${#gpus[@]}" \
            --chunk-idx "$index" \
            --allow-empty-chunk \
            --batch-size "${BATCH_SIZE:-auto}" \
            --temperature 0 \
            "$@" &
        pids+=($!)
    done
    for index in "${!pids[@]}"; do
        wait "${pids[index]}" || failed+=("$index")
    done
    trap - INT TERM
    if ((${#failed[@]})); then
        echo "chunks ${failed[*]} of ${#gpus[@]} failed; the same command again asks only what is missing" >&2
        return 1
    fi
    cat "${parts[@]}" >"$merged.partial"
    mv "$merged.partial" "$merged"
    echo "$merged: $(wc -l <"$merged") answers"
}
