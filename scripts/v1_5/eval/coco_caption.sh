#!/usr/bin/env bash
# COCO captions: one caption per image, CIDEr and BLEU-4.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

SPLIT="${SPLIT:-captions_val2014}"
ANNOTATIONS="$EVAL/coco_caption/annotations/$SPLIT.json"
ANSWERS="$EVAL/coco_caption/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "llava.eval coco_caption" \
    --question-file "$ANNOTATIONS" \
    --image-folder "${IMAGES:-$EVAL/coco_caption/val2014}" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" -m llava.eval.eval_captions --annotation-file "$ANNOTATIONS" --result-file "$ANSWERS" --tokenizer "${TOKENIZER:-ptb}"
