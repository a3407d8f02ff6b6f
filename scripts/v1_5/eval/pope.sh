#!/usr/bin/env bash
# POPE: answers, and F1 and accuracy of each category.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

ANSWERS="$EVAL/pope/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa_loader" \
    --question-file "$EVAL/pope/llava_pope_test.jsonl" \
    --image-folder "$EVAL/pope/val2014" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" -m llava.eval.eval_pope \
    --annotation-dir "$EVAL/pope/coco" \
    --question-file "$EVAL/pope/llava_pope_test.jsonl" \
    --result-file "$ANSWERS" \
    --strict
