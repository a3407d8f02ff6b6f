#!/usr/bin/env bash
# A sparse model (Dynamic-LLaVA) on VizWiz: scripts/v1_5/eval/vizwiz.sh under the original's names.
#
# CUDA_VISIBLE_DEVICES=0,1 MODEL=./results/dynamic-llava-7b bash run/dynamic_eval/eval_for_vizwiz.sh
set -euo pipefail

export MODEL="${MODEL:-./results/dynamic-llava-7b}" PROGRAMS=llava.dynamic_eval
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/v1_5/eval/vizwiz.sh" "$@"
