#!/usr/bin/env bash
# ScienceQA: answers and accuracy.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

ANSWERS="$EVAL/scienceqa/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa_science" \
    --question-file "$EVAL/scienceqa/llava_test_CQM-A.json" \
    --image-folder "$EVAL/scienceqa/images/test" \
    --single-pred-prompt \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" -m llava.eval.eval_science_qa \
    --base-dir "$EVAL/scienceqa" \
    --result-file "$ANSWERS" \
    --output-file "$EVAL/scienceqa/answers/${CKPT}_output.jsonl" \
    --output-result "$EVAL/scienceqa/answers/${CKPT}_result.json"
