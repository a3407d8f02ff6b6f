# What all training and evaluation scripts share: common flags, and how processes are started. Sourced, never run.
#
#   LAUNCHER  the program that starts training (default: deepspeed), for example "torchrun --nproc_per_node 8",
#             "accelerate launch", "deepspeed --hostfile scripts/hostfile", or "python" for one process
#   ZERO      DeepSpeed's configuration file; empty: plain data parallelism
#
# TRAIN_PROGRAM is set by the scripts that train by another module than llava.train.train_mem.
#
# The scripts run in any folder; ./checkpoints and ./playground in their defaults are below the current one. Flags given
# to a script are appended and win over its own.
set -euo pipefail

# Where this file and what the scripts need of their own are: in the repository, or where `python -m llava.scripts` wrote.
SCRIPTS="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)"

launch_training() {
    local launcher word module=-m zero=()
    : "${OUTPUT:?is set and empty: name a folder, or unset it to have the folder of the script}"
    read -ra launcher <<<"${LAUNCHER:-deepspeed}"
    # What python, torchrun and accelerate call -m, the launcher of DeepSpeed calls --module.
    for word in "${launcher[@]}"; do
        if [[ "${word##*/}" == deepspeed ]]; then module=--module; fi
    done
    if [[ -n "${ZERO-}" ]]; then zero=(--deepspeed "$ZERO"); fi
    "${launcher[@]}" "$module" "${TRAIN_PROGRAM:-llava.train.train_mem}" \
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
#   NODES, NODE           number of machines that share the questions and a file system, and which one this is, counted
#                         from 0 (default: those of a Slurm array, else one); all have equally many GPUs
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
# does the script, and MERGED stays as it was; the same command again asks only what has no answer yet. Of several
# machines the last one to finish puts the chunks together; on the others the script ends here.
answer_in_chunks() {
    local merged="$1" program="$2" folder gpus index chunk nodes node total pids=() failed=() parts=() missing=() base=()
    shift 2
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-0}"
    if ((${#gpus[@]} == 0)); then gpus=(""); fi
    nodes="${NODES:-${SLURM_ARRAY_TASK_COUNT:-1}}"
    node="${NODE:-$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))}"
    if ((node < 0 || node >= nodes)); then
        echo "NODE is $node, but NODES is $nodes: machines are counted from 0" >&2
        return 1
    fi
    total=$((nodes * ${#gpus[@]}))
    if [[ -n "${MODEL_BASE-}" ]]; then base=(--model-base "$MODEL_BASE"); fi
    folder="${merged%.jsonl}"
    if [[ "${merged##*/}" == merge.jsonl ]]; then folder="$(dirname "$merged")"; fi
    "$PYTHON" -m llava.eval.merge --output "$merged" # nothing but earlier answers may be there
    mkdir -p "$folder"
    for ((chunk = 0; chunk < total; chunk++)); do parts+=("$folder/${total}_$chunk.jsonl"); done
    # Processes in the background do not hear an interrupt from the keyboard.
    trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM
    for index in "${!gpus[@]}"; do
        chunk=$((node * ${#gpus[@]} + index))
        rm -f "${parts[chunk]}.done"
        # shellcheck disable=SC2086  # "llava.eval chartqa" is a program and its first argument
        CUDA_VISIBLE_DEVICES="${gpus[index]}" "$PYTHON" -m $program \
            --model-path "$MODEL" ${base[@]+"${base[@]}"} \
            --answers-file "${parts[chunk]}" \
            --num-chunks "$total" \
            --chunk-idx "$chunk" \
            --allow-empty-chunk \
            --batch-size "${BATCH_SIZE:-auto}" \
            --temperature 0 \
            "$@" &
        pids+=($!)
    done
    for index in "${!pids[@]}"; do
        chunk=$((node * ${#gpus[@]} + index))
        if ! wait "${pids[index]}"; then failed+=("$chunk"); elif ((nodes > 1)); then touch "${parts[chunk]}.done"; fi
    done
    trap - INT TERM
    if ((${#failed[@]})); then
        echo "chunks ${failed[*]} of $total failed; the same command again asks only what is missing" >&2
        return 1
    fi
    for chunk in "${!parts[@]}"; do
        if ((nodes > 1)) && [[ ! -e "${parts[chunk]}.done" ]]; then missing+=("$chunk"); fi
    done
    if ((${#missing[@]})); then
        echo "machine $node of $nodes is done; chunks ${missing[*]} of $total are not, the last machine goes on from here"
        exit 0
    fi
    "$PYTHON" -m llava.eval.merge --output "$merged" "${parts[@]}"
    echo "$merged: $(wc -l <"$merged") answers"
}
