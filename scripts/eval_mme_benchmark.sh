#!/usr/bin/env bash
# The chatbot LaVIN on MME: perception and cognition.
#
# CHECKPOINT is what scripts/vl_instruction_tuning_13b.sh wrote, or a .pth file of the original; MME is the benchmark's
# folder. scripts/lavin.bash says what else the environment may set. Flags given to this script win over its own.
set -euo pipefail
EVAL_LAUNCHER="${EVAL_LAUNCHER:-${LAUNCHER:-torchrun --nproc_per_node 1 --master_port 11345}}"
source "$(dirname "${BASH_SOURCE[0]}")/lavin.bash"

MME="${MME:-../data/mme}"
CHECKPOINT="${CHECKPOINT:-./15-eph-pretrain.pth}"
read -ra LAUNCH <<<"$EVAL_LAUNCHER"
read -ra MORE <<<"${EVAL_FLAGS-}"
TOWER=() # a folder names its own
if [[ -n "${VISION_TOWER-}" && -f "$CHECKPOINT" ]]; then TOWER=(--vision_tower "$VISION_TOWER"); fi

"${LAUNCH[@]}" -m mma.eval_mme \
    --ckpt_dir "$WEIGHTS" \
    --llm_model 13B \
    --adapter_path "$CHECKPOINT" \
    --root_dir_ "$MME" \
    --temperature 5. \
    --max_batch_size 16 \
    ${TOWER[@]+"${TOWER[@]}"} \
    "${LAVIN[@]}" \
    ${MORE[@]+"${MORE[@]}"} \
    "$@"
