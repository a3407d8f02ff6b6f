#!/usr/bin/env bash
# TextVQA: answers and accuracy.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

ANSWERS="$EVAL/textvqa/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa_loader" \
    --question-file "$EVAL/textvqa/llava_textvqa_val_v051_ocr.jsonl" \
    --image-folder "$EVAL/textvqa/train_images" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" -m llava.eval.eval_textvqa \
    --annotation-file "$EVAL/textvqa/TextVQA_0.5.1_val.json" \
    --result-file "$ANSWERS"
