#!/usr/bin/env bash
# The first LLaVA on ScienceQA, answered with all GPUs: answers in one file, which sqa_eval_gather.sh scores.
#
# For models that explain their answers (QCM-LEA, scripts/finetune_sqa.sh). LLaVA-1.5, which names a letter:
# scripts/v1_5/eval/sqa.sh. scripts/common.bash says what the environment may set besides these three; flags given to this
# script go to the program that answers:
#   MODEL=./checkpoints/my-sqa SCIENCEQA=/data/scienceqa ANSWERS=./my.jsonl bash scripts/sqa_eval_batch.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

MODEL="${MODEL:-liuhaotian/llava-lcs558k-scienceqa-vicuna-13b-v1.3}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0,1,2,3,4,5,6,7}"
evaluation_settings
SCIENCEQA="${SCIENCEQA:-$EVAL/scienceqa}"
ANSWERS="${ANSWERS-./test_llava-13b.jsonl}"
: "${ANSWERS:?is set and empty: name a file, or unset it to have the file of the script}"

answer_in_chunks "$ANSWERS" "$PROGRAMS.model_vqa_science" \
    --question-file "$SCIENCEQA/llava_test_QCM-LEA.json" \
    --image-folder "$SCIENCEQA/images/test" \
    --conv-mode "${CONV_MODE:-llava_v1}" \
    "$@"
