#!/usr/bin/env bash
# ChartQA: answers and relaxed accuracy.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

SPLIT="${SPLIT:-test}"
ANSWERS="$EVAL/chartqa/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "llava.eval chartqa" \
    --question-file "$EVAL/chartqa/$SPLIT" \
    --image-folder "$EVAL/chartqa/$SPLIT/png" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" -m llava.eval.eval_chartqa --annotation-dir "$EVAL/chartqa/$SPLIT" --result-file "$ANSWERS"
