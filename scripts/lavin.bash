# What the scripts of LaVIN share. Sourced, never run. From the environment:
#
#   WEIGHTS            folder with 7B/, 13B/, vicuna_7B/, ... and tokenizer.model (default: ../data/weights/)
#   DATA               folder with problems.json, pid_splits.json, captions.json, images/ (default: ../data)
#   VISION_TOWER       folder or hub id of the tower (default: openai/clip-vit-large-patch14)
#   OUTPUT             where the checkpoint goes (default: the original's folder)
#   LAUNCHER           what starts training (default: torchrun with the original's number of GPUs)
#   EVAL_LAUNCHER      what starts the evaluation (default: torchrun with one GPU; more share the questions)
#   EVAL_FLAGS         further flags of the evaluation, for example "--limit 100"
#
# The scripts run in any folder; relative paths start at the current one. Flags given to a script go to the program that
# trains and win over its own, as do those of EVAL_FLAGS.
set -euo pipefail

WEIGHTS="${WEIGHTS:-../data/weights/}"
DATA="${DATA:-../data}"
EVAL_LAUNCHER="${EVAL_LAUNCHER:-torchrun --nproc_per_node 1}"

# What training and evaluation have in common; the scripts add --llm_model, --temperature and the like.
LAVIN=(
    --max_seq_len 512
    --adapter_type attn
    --adapter_dim 8
    --adapter_scale 1
    --n_prompt 6
    --prompt_format QCM-ALE
    --visual_adapter_type router
)

# train_lavin DEFAULT_LAUNCHER FLAGS...
train_lavin() {
    local launcher tower=()
    : "${OUTPUT:?is set and empty: name a folder, or unset it to have the folder of the script}"
    read -ra launcher <<<"${LAUNCHER:-$1}"
    shift
    if [[ -n "${VISION_TOWER-}" ]]; then tower=(--vision_tower "$VISION_TOWER"); fi
    "${launcher[@]}" -m mma.train \
        --llama_model_path "$WEIGHTS" \
        --data_root "$DATA" \
        --caption_file "$DATA/captions.json" \
        --output_dir "$OUTPUT" \
        --blr 9e-3 \
        --weight_decay 0.02 \
        ${tower[@]+"${tower[@]}"} \
        "${LAVIN[@]}" \
        "$@"
}

# evaluate_lavin FLAGS...: the test split of ScienceQA.
evaluate_lavin() {
    local launcher more
    read -ra launcher <<<"$EVAL_LAUNCHER"
    read -ra more <<<"${EVAL_FLAGS-}"
    "${launcher[@]}" -m mma.eval \
        --ckpt_dir "$WEIGHTS" \
        --data_root "$DATA" \
        --caption_file "$DATA/captions.json" \
        --adapter_path "$OUTPUT" \
        --split test \
        --max_batch_size 64 \
        "${LAVIN[@]}" \
        "$@" \
        ${more[@]+"${more[@]}"}
}
