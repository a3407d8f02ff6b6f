#!/usr/bin/env bash
# SEED-Bench: answers, accuracy by type, and the file for its leaderboard.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

MERGED="$EVAL/seed_bench/answers/$CKPT/merge.jsonl"

answer_in_chunks "$MERGED" "$PROGRAMS.model_vqa_loader" \
    --question-file "$EVAL/seed_bench/llava-seed-bench.jsonl" \
    --image-folder "$EVAL/seed_bench" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" "$SCRIPTS/convert_seed_for_submission.py" \
    --annotation-file "$EVAL/seed_bench/SEED-Bench.json" \
    --result-file "$MERGED" \
    --result-upload-file "$EVAL/seed_bench/answers_upload/$CKPT.jsonl"
