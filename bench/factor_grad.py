"""dA, dB and W0 + dW out of a block of G in bf16, beside a copy of the same bytes.

A block is what one step of the layer's backward holds: all rows, and as many columns as its workspace.

snell bench factor-grad [--rank 8 --rank 32] [--shape IN OUT]
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from snell import functional
from snell.bench.device_timing import Run, ceilings, median_seconds, num_sets, operation_command, report, update
from snell.schedule import block_length


def measure(m: int, n: int, rank: int, device: str) -> dict[str, Any]:
    cols = block_length(2 * m, n, device)
    A, B, theta = update(m, n, rank, device)
    tau = functional.select_threshold(A, B, theta, sparsity=0.9, kernel="piecewise_linear", groups=2)
    # One copy a pass serves every block; the layer makes it.
    A, B = A[:cols].t().contiguous().t(), B.t().contiguous().t()
    grads = torch.zeros(cols, rank, device=device), torch.zeros(m, rank, device=device), torch.zeros_like(theta)
    sets = num_sets(6 * m * cols, device)
    G, W, out = ([torch.randn(m, cols, device=device, dtype=torch.bfloat16) for _ in range(sets)] for _ in range(3))
    setting = ("piecewise_linear", 2, "soft")
    steps = [
        lambda g=g, w=w, o=o: torch.ops.snell.factor_grad(g, A, B, theta, tau, w, o, *grads, *setting)
        for g, w, o in zip(G, W, out, strict=True)
    ]
    copies = [lambda g=g, o=o: o.copy_(g) for g, o in zip(G, out, strict=True)]
    seconds, copied = median_seconds(steps, device), median_seconds(copies, device)
    return {
        "out": m,
        "columns": cols,
        "rank": rank,
        "ms": seconds * 1e3,
        "ms of the layer": seconds * 1e3 * n / cols,
        "ms of 1.5 copies": 1.5 * copied * 1e3,
        "TB/s": 6 * m * cols / seconds / 1e12,
        # The statistic as in merge, and two products on tensor cores.
        "TFLOP/s": (3 + 4) * rank * m * cols / seconds / 1e12,
    }


@operation_command
def main(run: Run) -> None:
    cases = [(m, n, rank) for n, m in run.shapes for rank in run.ranks]
    rows = [measure(m, n, rank, run.device) for m, n, rank in tqdm(cases, desc="factor_grad")]
    report("factor-grad", run, ceilings(run.device), rows)


if __name__ == "__main__":
    main()
