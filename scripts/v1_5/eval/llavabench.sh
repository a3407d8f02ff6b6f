#!/usr/bin/env bash
# LLaVA-Bench (in the wild): answers.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

FOLDER="$EVAL/llava-bench-in-the-wild"
ANSWERS="$FOLDER/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa" \
    --question-file "$FOLDER/questions.jsonl" \
    --image-folder "$FOLDER/images" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

echo "have $ANSWERS reviewed against $FOLDER/answers_gpt4.jsonl; docs/evaluation.md says how"
