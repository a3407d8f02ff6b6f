#!/usr/bin/env bash
# The accuracy on ScienceQA of what sqa_eval_batch.sh has answered. Needs the same SCIENCEQA and ANSWERS, if they were set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
evaluation_settings

SCIENCEQA="${SCIENCEQA:-$EVAL/scienceqa}"
ANSWERS="${ANSWERS-./test_llava-13b.jsonl}"
: "${ANSWERS:?is set and empty: name a file, or unset it to have the file of the script}"

"$PYTHON" -m llava.eval.eval_science_qa \
    --base-dir "$SCIENCEQA" \
    --result-file "$ANSWERS" \
    --output-file "${ANSWERS%.jsonl}_output.json" \
    --output-result "${ANSWERS%.jsonl}_result.json" \
    "$@"
