#!/usr/bin/env bash
# Q-Bench in Chinese, with the questions in QUESTIONS or under the names of qbench.sh. Usage: qbench_zh.sh [SPLIT]
set -euo pipefail

export BENCHMARK=qbench_zh LANGUAGE_OF_REQUEST=zh
exec bash "$(dirname "${BASH_SOURCE[0]}")/qbench.sh" "$@"
