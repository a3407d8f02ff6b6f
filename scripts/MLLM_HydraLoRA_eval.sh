#!/usr/bin/env bash
# Answer the questions of TextVQA with a model that scripts/MLLM_HydraLoRA.sh trained, one JSON line per answer.
#
# The command of the original's README with its flags and values; questions and images are those of LLaVA's own
# TextVQA evaluation. Hardware: one GPU; the time of a full run has not been measured with this code.
#
# Paths and program come from the environment, further flags are appended and win over those below.
set -euo pipefail

MODEL="${MODEL:-checkpoints/llava-v1.5-7b}"
CHECKPOINT="${CHECKPOINT:-checkpoints/llava-v1.5-7b-lora-mohle}"
QUESTIONS="${QUESTIONS:-./playground/data/eval/textvqa/llava_textvqa_val_v051_ocr.jsonl}"
IMAGES="${IMAGES:-./playground/data/eval/textvqa/train_images}"
ANSWERS="${ANSWERS-./eval-output/textvqa/llava-mohle-7b.jsonl}"
: "${ANSWERS:?is set and empty: name a file, or unset it to have the file of the script}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"

"${PYTHON:-python}" -m llava.eval.model_vqa_loader \
    --model-base "$MODEL" \
    --model-path "$CHECKPOINT" \
    --question-file "$QUESTIONS" \
    --image-folder "$IMAGES" \
    --answers-file "$ANSWERS" \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@"
