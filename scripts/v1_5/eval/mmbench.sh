#!/usr/bin/env bash
# MMBench: answers, and the spreadsheet for its server.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

BENCHMARK="${BENCHMARK:-mmbench}"
SPLIT="${SPLIT:-mmbench_dev_20230712}"

answer_in_chunks "$EVAL/$BENCHMARK/answers/$SPLIT/$CKPT.jsonl" "$PROGRAMS.model_vqa_mmbench" \
    --question-file "$EVAL/$BENCHMARK/$SPLIT.tsv" \
    --lang "${LANGUAGE_OF_REQUEST:-en}" \
    --single-pred-prompt \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" "$SCRIPTS/convert_mmbench_for_submission.py" \
    --annotation-file "$EVAL/$BENCHMARK/$SPLIT.tsv" \
    --result-dir "$EVAL/$BENCHMARK/answers/$SPLIT" \
    --upload-dir "$EVAL/$BENCHMARK/answers_upload/$SPLIT" \
    --experiment "$CKPT"
echo "upload to the MMBench server: $EVAL/$BENCHMARK/answers_upload/$SPLIT/$CKPT.xlsx"
