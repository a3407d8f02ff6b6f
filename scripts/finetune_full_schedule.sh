#!/usr/bin/env bash
# Stage 2 of the first LLaVA on its whole instruction data: finetune.sh for three epochs. Not for LLaVA-1.5.
set -euo pipefail
export DATA="${DATA:-./playground/data/llava_instruct_158k.json}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" --num_train_epochs 3 "$@"
