#!/usr/bin/env bash
# Everything a GPU has to show, in stages of at most 9 minutes that each stand alone.
#   bench/gpu.sh [STAGE...]      all of them unless given; OUT=FOLDER, bench/results/gpu unless set
#
# tests       every operation against the float64 reference, equal bits whatever the tile, captured graphs, streams
# cuda        the same tests of select by the CUDA library, its times, and those of Triton's select
# tensor      the same tests with K on tensor cores, and its operations' times
# sanitizer   no access out of bounds, no race in shared memory and no missing barrier in select's kernels
# operations  each operation beside a copy or a product of its size, and beside its prediction in docs/kernels.md
# layer       forward and backward of a layer beside three GEMMs, LoRA and the published algorithm
# models      a training step of three models, its memory beside LoRA's
# tune        the best launch parameters, as rows for kernels/table.py
#
# A stage's output is OUT/STAGE.txt. A stage that fails does not keep the next from running.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/gpu}
mkdir -p "$out"
unset TRITON_INTERPRET # the kernels themselves, not the interpreter's

suite() { python -m pytest --no-header -m gpu tests/backends/test_on_gpu.py "$@"; }

tests() { suite; }

cuda() {
    python -c 'import sys; from snell.kernels import cuda; sys.exit(cuda.problem())'
    SNELL_CUDA_SELECT=1 suite -k "tau or survivors"
    snell bench select --out "$out/triton"
    SNELL_CUDA_SELECT=1 snell bench select --out "$out/cuda"
}

tensor() {
    SNELL_TENSOR_CORES=1 suite
    for operation in merge select factor-grad; do
        SNELL_TENSOR_CORES=1 snell bench "$operation" --out "$out/tensor"
    done
}

sanitizer() {
    local tool
    for tool in memcheck racecheck synccheck; do
        SNELL_CUDA_SELECT=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python -m pytest --no-header -m gpu tests/backends/test_on_gpu.py -k "tau_has_the_bits"
    done
}

operations() {
    for operation in merge select factor-grad generate; do
        snell bench "$operation" --out "$out"
    done
}

layer() { snell bench layer --device cuda --seconds 8 --out "$out"; }

models() { snell bench models --device cuda --out "$out"; }

tune() { snell bench tune --out "$out"; }

export -f suite tests cuda tensor sanitizer operations layer models tune
export out
stages=("$@")
[ $# -gt 0 ] || stages=(tests cuda tensor sanitizer operations layer models tune)
failed=()
for stage in "${stages[@]}"; do
    echo "== $stage"
    timeout 540 bash -euo pipefail -c "$stage" 2>&1 | tee "$out/$stage.txt"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$stage")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
