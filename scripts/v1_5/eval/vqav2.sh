#!/usr/bin/env bash
# VQAv2: answers, and the file for its server.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

SPLIT="${SPLIT:-llava_vqav2_mscoco_test-dev2015}"

answer_in_chunks "$EVAL/vqav2/answers/$SPLIT/$CKPT/merge.jsonl" "$PROGRAMS.model_vqa_loader" \
    --question-file "$EVAL/vqav2/$SPLIT.jsonl" \
    --image-folder "$EVAL/vqav2/test2015" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" "$SCRIPTS/convert_vqav2_for_submission.py" --split "$SPLIT" --ckpt "$CKPT" --dir "$EVAL/vqav2"
echo "upload to the VQAv2 server: $EVAL/vqav2/answers_upload/$SPLIT/$CKPT.json"
