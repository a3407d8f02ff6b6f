#!/usr/bin/env bash
# MME: answers, and the points of each task, of perception and cognition.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

ANSWERS="$EVAL/MME/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa_loader" \
    --question-file "$EVAL/MME/llava_mme.jsonl" \
    --image-folder "$EVAL/MME/MME_Benchmark_release_version" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" "$SCRIPTS/convert_mme_for_eval.py" \
    --data-dir "$EVAL/MME/MME_Benchmark_release_version" \
    --result-file "$ANSWERS" \
    --output-dir "$EVAL/MME/eval_tool/answers/$CKPT"
"$PYTHON" -m llava.eval.eval_mme --results_dir "$EVAL/MME/eval_tool/answers/$CKPT" \
    --data-dir "$EVAL/MME/MME_Benchmark_release_version"
