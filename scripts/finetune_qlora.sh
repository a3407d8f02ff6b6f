#!/usr/bin/env bash
# Stage 2 of the first LLaVA with LoRA on a base of 4 bits (QLoRA): finetune_lora.sh with --bits 4. Not for LLaVA-1.5.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/finetune_lora.sh" --bits 4 "$@"
