#!/usr/bin/env bash
# VizWiz: answers, and the file for its server.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

ANSWERS="$EVAL/vizwiz/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa_loader" \
    --question-file "$EVAL/vizwiz/llava_test.jsonl" \
    --image-folder "$EVAL/vizwiz/test" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" "$SCRIPTS/convert_vizwiz_for_submission.py" \
    --annotation-file "$EVAL/vizwiz/llava_test.jsonl" \
    --result-file "$ANSWERS" \
    --result-upload-file "$EVAL/vizwiz/answers_upload/$CKPT.json"
echo "upload to the VizWiz server: $EVAL/vizwiz/answers_upload/$CKPT.json"
