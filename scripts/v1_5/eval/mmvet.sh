#!/usr/bin/env bash
# MM-Vet: answers, and the file for its evaluator.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

ANSWERS="$EVAL/mm-vet/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa" \
    --question-file "$EVAL/mm-vet/llava-mm-vet.jsonl" \
    --image-folder "$EVAL/mm-vet/images" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" "$SCRIPTS/convert_mmvet_for_eval.py" --src "$ANSWERS" --dst "$EVAL/mm-vet/results/$CKPT.json" \
    --question-file "$EVAL/mm-vet/llava-mm-vet.jsonl"
echo "score with MM-Vet's evaluator: $EVAL/mm-vet/results/$CKPT.json"
