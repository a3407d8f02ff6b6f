#!/usr/bin/env bash
# LLaVA-Bench (in the wild): answers, and with OPENAI_API_KEY their reviews and the score; RULE is upstream's rule.json.
#
# docs/evaluation.md says which files are needed; scripts/common.bash, what the environment may set. Flags given to this
# script go to the program that answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.bash"
evaluation_settings

FOLDER="$EVAL/llava-bench-in-the-wild"
ANSWERS="$FOLDER/answers/$CKPT.jsonl"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa" \
    --question-file "$FOLDER/questions.jsonl" \
    --image-folder "$FOLDER/images" \
    --conv-mode "${CONV_MODE:-vicuna_v1}" \
    "$@"

if [[ -z "${OPENAI_API_KEY-}" ]]; then
    echo "set OPENAI_API_KEY and RULE to have $ANSWERS reviewed; docs/evaluation.md says how"
    exit
fi
"$PYTHON" -m llava.eval.eval_gpt_review_bench \
    --question "$FOLDER/questions.jsonl" \
    --context "$FOLDER/context.jsonl" \
    --rule "${RULE:-$FOLDER/rule.json}" \
    --answer-list "$FOLDER/answers_gpt4.jsonl" "$ANSWERS" \
    --output "$FOLDER/reviews/$CKPT.jsonl"
"$PYTHON" -m llava.eval.summarize_gpt_review -f "$FOLDER/reviews/$CKPT.jsonl" --question "$FOLDER/questions.jsonl"
