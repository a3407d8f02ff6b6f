#!/usr/bin/env bash
# Train Dynamic-LLaVA-13B from LLaVA-1.5-13B: train_dynamic_llava_7b.sh with another model and folder.
#
#   MODEL=/data/llava-v1.5-13b bash run/train_dynamic_llava_13b.sh --max_steps 10
set -euo pipefail

export MODEL="${MODEL:-./checkpoints/llava-v1.5-13b}" OUTPUT="${OUTPUT-./results/dynamic-llava-13b}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_dynamic_llava_7b.sh" "$@"
