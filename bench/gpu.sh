#!/usr/bin/env bash
# Everything a GPU has to show, in under 8 minutes: correctness first, then the benchmarks, into one folder.
#   bench/gpu.sh [FOLDER]      (bench/results/gpu unless given)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
mkdir -p "$out"

# The kernels themselves, not the interpreter's.
unset TRITON_INTERPRET
python -m pytest -m gpu tests 2>&1 | tee "$out/tests.txt"

for operation in merge select factor_grad generate; do
    timeout 90 python -m "bench.$operation" --out "$out/$operation.json" 2>/dev/null | tee "$out/$operation.txt"
done
timeout 150 python -m bench.layer --device cuda --out "$out/layer.json" 2>/dev/null | tee "$out/layer.txt"
