"""tau of a layer, of a layer whose factors did not change, and of all layers of a model in one call.

snell bench select [--rank 8 --rank 32] [--shape IN OUT]
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from snell import functional
from snell.bench.device_timing import Run, ceilings, median_seconds, operation_command, report, update
from snell.bench.measure import extra_peak_bytes
from snell.kernels.selection import Update, forget, select_thresholds

#: in, out of every adapted layer of one transformer block, and how many blocks.
MODELS = {
    "ViT-B/16": ([(768, 768)] * 4 + [(768, 3072), (3072, 768)], 12),
    "7B Llama": ([(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)], 32),
}


def measure(m: int, n: int, rank: int, device: str) -> dict[str, Any]:
    A, B, theta = update(m, n, rank, device)

    def known() -> torch.Tensor:
        return functional.select_threshold(A, B, theta, sparsity=0.9, kernel="piecewise_linear", groups=2)

    def anew() -> torch.Tensor:
        forget()
        return known()

    seconds = median_seconds([anew], device)
    return {
        "layers": f"{n} x {m}",
        "rank": rank,
        "ms": seconds * 1e3,
        "ms known": median_seconds([known], device) * 1e3,
        "entries/ns": m * n / seconds / 1e9,
        "fp32 TFLOP/s": 3 * rank * m * n / seconds / 1e12,
        "extra MiB": (extra_peak_bytes(anew, device) or 0) / 2**20,
    }


def measure_model(name: str, rank: int, device: str) -> dict[str, Any]:
    block, blocks = MODELS[name]
    updates = [Update(*update(m, n, rank, device), 0.9) for n, m in block * blocks]
    entries = sum(u.A.shape[0] * u.B.shape[0] for u in updates)

    def together() -> torch.Tensor:
        forget()
        return select_thresholds(updates, "piecewise_linear", 2)

    def apart() -> list[torch.Tensor]:
        forget()
        return [select_thresholds([u], "piecewise_linear", 2) for u in updates]

    seconds = median_seconds([together], device, repetitions=5)
    return {
        "layers": name,
        "rank": rank,
        "ms": seconds * 1e3,
        "ms one by one": median_seconds([apart], device, repetitions=5) * 1e3,
        "entries/ns": entries / seconds / 1e9,
        "fp32 TFLOP/s": 3 * rank * entries / seconds / 1e12,
        "extra MiB": (extra_peak_bytes(together, device) or 0) / 2**20,
    }


@operation_command
def main(run: Run) -> None:
    cases = [(m, n, rank) for n, m in run.shapes for rank in run.ranks]
    limits = ceilings(run.device)
    report("select", run, limits, [measure(m, n, r, run.device) for m, n, r in tqdm(cases, desc="select")])
    if run.device == "cuda":
        models = [(name, rank) for name in MODELS for rank in run.ranks]
        rows = [measure_model(name, rank, run.device) for name, rank in tqdm(models, desc="select, models")]
        report("select", run, limits, rows, file="select-models")


if __name__ == "__main__":
    main()
