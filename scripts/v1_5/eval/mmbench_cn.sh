#!/usr/bin/env bash
# MMBench-CN: answers, and the spreadsheet for its server. See mmbench.sh.
set -euo pipefail

export BENCHMARK=mmbench_cn LANGUAGE_OF_REQUEST=cn SPLIT="${SPLIT:-mmbench_dev_cn_20231003}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/mmbench.sh" "$@"
