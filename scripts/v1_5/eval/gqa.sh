#!/usr/bin/env bash
# GQA: answers and accuracy; where GQA's own program is, its numbers too.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

SPLIT="${SPLIT:-llava_gqa_testdev_balanced}"
GQADIR="${GQADIR:-$EVAL/gqa/data}"
MERGED="$EVAL/gqa/answers/$SPLIT/$CKPT/merge.jsonl"

answer_in_chunks "$MERGED" "$PROGRAMS.model_vqa_loader" \
    --question-file "$EVAL/gqa/$SPLIT.jsonl" \
    --image-folder "$EVAL/gqa/data/images" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

"$PYTHON" "$SCRIPTS/convert_gqa_for_eval.py" --src "$MERGED" --dst "$GQADIR/testdev_balanced_predictions.json" \
    --question-file "$EVAL/gqa/$SPLIT.jsonl"
"$PYTHON" -m llava.eval.eval_gqa \
    --questions "$GQADIR/testdev_balanced_questions.json" \
    --predictions "$GQADIR/testdev_balanced_predictions.json"
if [[ -f "$GQADIR/eval/eval.py" ]]; then
    cd "$GQADIR"
    "$PYTHON" eval/eval.py --tier testdev_balanced
fi
