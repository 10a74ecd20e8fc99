#!/usr/bin/env bash
# Everything that waits for a CUDA device, in one go: its tests, the accuracy log, the frontier. 23 minutes at most: each
# part is stopped at its limit.
#
#   bash benchmarks/on_gpu.sh [tests] [accuracy] [frontier]     all three by default
#
# PYTHON is the interpreter (python3), OUT where logs and tables go (runs/gpu). Nothing need be installed beside torch,
# transformers, PEFT, pytest and hypothesis; with bitsandbytes there are rows for NF4. A part that fails stops no other.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=99
failed=0

part() {
    local name=$1 seconds=$2 started=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    echo "$name: exit status $code after $((SECONDS - started)) s; $OUT/$name.log"
    [ $code = 0 ] || failed=1
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
for wanted in "${@:-tests accuracy frontier}"; do
    for name in $wanted; do
        case $name in
        tests) part tests 300 "$PYTHON" -m pytest -q -m gpu -rA --tb=short -p no:cacheprovider tests/test_gpu.py tests/test_memory_metrics.py ;;
        accuracy) part accuracy 500 "$PYTHON" benchmarks/accuracy_gpu.py --output "$OUT/accuracy.json" --page "$OUT/accuracy.md" ;;
        frontier) part frontier 560 "$PYTHON" benchmarks/gpu.py --output "$OUT/frontier.json" ;;
        *) echo "no such part: $name" >&2 && exit 2 ;;
        esac
    done
done
exit $failed
