#!/usr/bin/env bash
# Put the extensions into a checkout of upstream's LLaVA: moe_patch/patch.sh LLAVA_DIR [options of `apply`].
# Needs Python 3.10 or later and nothing else; PYTHON names another one. Undo with: python -m moe_patch revert LLAVA_DIR
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m moe_patch apply "$@"
