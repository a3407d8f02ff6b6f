#!/usr/bin/env bash
# Compare the A and B matrices of LoRA adapters trained on different data (figure 3 of the paper), by the original's list.
#
# MODEL_PATHS has a name and an adapter each, its folder or file of weights; further flags go to the program:
#   MODEL_PATHS='{"math": "./math/adapter_model.safetensors", "law": "./law"}' bash scripts/hydralora/tesn_lora.sh
set -euo pipefail

if [[ -z "${MODEL_PATHS-}" ]]; then
    MODEL_PATHS='{"Name_1": "path_to_lora_1", "Name_2": "path_to_lora_2", "Name_3": "path_to_lora_3", "Name_4": "path_to_lora_4"}'
fi
export MODEL_PATHS

"${PYTHON:-python}" -m hydralora.analysis "$@"
