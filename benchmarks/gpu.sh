#!/usr/bin/env bash
# Everything that needs a GPU, most important first, within eight minutes on one device.
#
#   bash benchmarks/gpu.sh FOLDER                         on a GPU, with the sizes of LLaVA-1.5-7B and random weights
#   bash benchmarks/gpu.sh FOLDER --device cpu --small    the same steps with tiny sizes, to try the script
#
# FOLDER gets a JSON record and the output of each step as soon as it ends, and gpu.log a line when a step begins and
# ends, so the script may be cut at any moment. A step that fails, or is over its share of the time, does not stop the
# others; the exit status is then 1. PYTHON names the interpreter, SECONDS_IN_ALL the limit (default 480).
set -uo pipefail

FOLDER="${1:?name a folder for the records}"
shift
DEVICE=cuda SMALL=()
while (($#)); do
    case "$1" in
        --device) DEVICE="${2:?--device cuda or cpu}"; shift 2 ;;
        --small) SMALL=(--small); shift ;;
        *) echo "unknown option $1; known: --device cuda|cpu, --small" >&2; exit 2 ;;
    esac
done
PYTHON="${PYTHON:-python}"
LIMIT="${SECONDS_IN_ALL:-480}"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
mkdir -p "$FOLDER" || exit 1
FOLDER="$(cd -- "$FOLDER" && pwd)"
LOG="$FOLDER/gpu.log"
FAILED=0
SECONDS=0

note() { printf '%s %4ss %s\n' "$(date -u +%FT%TZ)" "$SECONDS" "$*" | tee -a "$LOG"; }

# step NAME SECONDS PROGRAM...: run a program for at most so long, and at most as long as there is time left.
step() {
    local name="$1" share="$2" left=$((LIMIT - SECONDS)) status
    shift 2
    if ((left <= 5)); then note "$name: left out, no time"; FAILED=1; return; fi
    if ((share > left)); then share=$left; fi
    note "$name: begins, at most ${share}s: $*"
    timeout --kill-after=10 "$share" "$@" >"$FOLDER/$name.txt" 2>&1
    status=$?
    note "$name: ends with status $status"
    if ((status)); then FAILED=1; tail -n 5 "$FOLDER/$name.txt" >>"$LOG"; fi
}

run() { local name="$1" share="$2"; shift 2; step "$name" "$share" "$PYTHON" -m "$@" --output "$FOLDER/$name.json"; }

if ((${#SMALL[@]})); then
    FULL=(--small --batch 1 --length 192 --tokens 2 --repeats 1 --batch-sizes 1 2)
    ATTENTION=(--lengths 64 --rounds 1)
    SPARSE=(--layers 2 --width 64 --patches 16 --batches 1 2 --tokens 4 --train-text 8 --repeats 1)
else
    FULL=()
    ATTENTION=(--lengths 1024 2048 --heads 32 --width 128)
    SPARSE=(--batches 1 8 32 --tokens 64 --repeats 3)
fi

note "device $DEVICE, commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
if [[ "$DEVICE" == cuda ]]; then step nvidia-smi 10 nvidia-smi; fi
run updates 120 benchmarks.full_size lora hydralora --device "$DEVICE" ${FULL[@]+"${FULL[@]}"}
run policy-attention 60 benchmarks.policy_attention --device "$DEVICE" "${ATTENTION[@]}"
run sparse 120 benchmarks.dynamic --device "$DEVICE" "${SPARSE[@]}"
run answers 80 benchmarks.full_size answers --device "$DEVICE" ${FULL[@]+"${FULL[@]}"}
if [[ "$DEVICE" == cuda ]]; then step tests 100 "$PYTHON" -m pytest -q -m gpu tests/dynamic tests/llava/model/test_packed_rows.py; fi
note "finished, status $FAILED"
exit "$FAILED"
