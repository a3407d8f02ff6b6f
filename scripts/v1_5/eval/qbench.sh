#!/usr/bin/env bash
# Q-Bench: answers to the questions of SPLIT, dev (the default) or test; accuracy on dev. Usage: qbench.sh [SPLIT]
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

if [[ "${1-}" == dev || "${1-}" == test ]]; then
    SPLIT="$1"
    shift
fi
SPLIT="${SPLIT:-dev}"
BENCHMARK="${BENCHMARK:-qbench}"
NAME="${BENCHMARK/qbench/llvisionqa}_$SPLIT" # llvisionqa_dev, llvisionqa_zh_test
QUESTIONS="${QUESTIONS:-$EVAL/qbench/llvisionqa_$SPLIT.json}"
ANSWERS="$EVAL/qbench/answers/${NAME}_$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa_qbench" \
    --image-folder "$EVAL/qbench/images_llvisionqa/" \
    --questions-file "$QUESTIONS" \
    --conv-mode "${CONV_MODE:-llava_v1}" \
    --lang "${LANGUAGE_OF_REQUEST:-en}" \
    "$@"

"$PYTHON" -m llava.eval.eval_qbench --result-file "$ANSWERS" --question-file "$QUESTIONS"
