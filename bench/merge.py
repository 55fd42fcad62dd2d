"""W0 + dW of a whole layer in bf16, beside a copy of the same bytes.

snell bench merge [--rank 8 --rank 32] [--shape IN OUT]
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from snell import functional
from snell.bench.device_timing import Run, ceilings, median_seconds, num_sets, operation_command, report, update


def measure(m: int, n: int, rank: int, device: str) -> dict[str, Any]:
    A, B, theta = update(m, n, rank, device)
    setting = {"kernel": "piecewise_linear", "groups": 2}
    tau = functional.select_threshold(A, B, theta, sparsity=0.9, **setting)
    sets = num_sets(4 * m * n, device)
    weights = [torch.randn(m, n, device=device, dtype=torch.bfloat16) for _ in range(sets)]
    outs = [torch.empty_like(weight) for weight in weights]
    steps = [
        lambda w=w, out=out: torch.ops.snell.merge_out(A, B, theta, tau, w, out, "piecewise_linear", 2, "soft")
        for w, out in zip(weights, outs, strict=True)
    ]
    copies = [lambda w=w, out=out: out.copy_(w) for w, out in zip(weights, outs, strict=True)]
    seconds, copied = median_seconds(steps, device), median_seconds(copies, device)
    return {
        "in": n,
        "out": m,
        "rank": rank,
        "ms": seconds * 1e3,
        "ms of a copy": copied * 1e3,
        "TB/s": 4 * m * n / seconds / 1e12,
        # A subtraction and a fused multiply-add a column.
        "fp32 TFLOP/s": 3 * rank * m * n / seconds / 1e12,
    }


@operation_command
def main(run: Run) -> None:
    cases = [(m, n, rank) for n, m in run.shapes for rank in run.ranks]
    rows = [measure(m, n, rank, run.device) for m, n, rank in tqdm(cases, desc="merge")]
    report("merge", run, ceilings(run.device), rows)


if __name__ == "__main__":
    main()
