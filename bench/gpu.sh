#!/usr/bin/env bash
# Everything a GPU has to show, in under 8 minutes: correctness first, then the benchmarks, into one folder.
#   bench/gpu.sh [FOLDER]      (bench/results/gpu unless given)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
mkdir -p "$out"

# The kernels themselves, not the interpreter's.
unset TRITON_INTERPRET
timeout 200 python -m pytest --no-header -m gpu tests/backends/test_on_gpu.py | tee "$out/tests.txt"

# The same selection by the CUDA library, where nvcc has built it.
if python -c 'import sys; from snell.kernels import cuda; sys.exit(bool(cuda.problem()))'; then
    SNELL_CUDA_SELECT=1 timeout 60 python -m pytest --no-header -m gpu tests/backends/test_on_gpu.py -k "tau or survivors" |
        tee "$out/tests-cuda.txt"
    SNELL_CUDA_SELECT=1 timeout 35 snell bench select --out "$out/cuda" | tee "$out/select-cuda.txt"
fi

for operation in merge select factor-grad generate; do
    timeout 35 snell bench "$operation" --out "$out" | tee "$out/$operation.txt"
done
timeout 140 snell bench layer --device cuda --seconds 4 --out "$out" | tee "$out/layer.txt"
