"""Times candidate tiles of every kernel on this GPU and prints a row for each for ``snell.kernels.table``.

snell bench tune [--rank 8 --rank 32] [--shape IN OUT]

A candidate's time is the sum over the cases; one that does not compile for this GPU is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from snell.bench.device_timing import Run, median_seconds, operation_command, update
from snell.kernels import factor_grad, few_tokens, launch, merge
from snell.kernels.selection import Update, forget, select_thresholds
from snell.kernels.table import TABLE, Row

#: Rows, columns and warps of a tile: what leaves between 8 and 32 entries a thread.
CANDIDATES = {
    "select": (2, 4, 8, 16),
    "merge": (32, 64, 128),
    "factor_grad": (32, 64, 128),
    "few_tokens": (64, 128),
}
COLUMNS = {"select": (256, 512), "merge": (64, 128), "factor_grad": (32, 64, 128), "few_tokens": (32, 64, 128)}

SETTING = ("piecewise_linear", 2, "soft")


def candidates(operation: str) -> list[Row]:
    rows = itertools.starmap(Row, itertools.product(CANDIDATES[operation], COLUMNS[operation], (4, 8)))
    return [row for row in rows if 8 <= row.block_m * row.block_n // (32 * row.num_warps) <= 32]


def steps(operation: str, m: int, n: int, rank: int) -> Callable[[], object]:
    """One call of the operation on a layer of this size."""
    A, B, theta = update(m, n, rank, "cuda")
    tau = select_thresholds([Update(A, B, theta, 0.9)], *SETTING[:2]).squeeze(0)
    A, B = launch.k_major(A), launch.k_major(B)

    def weights(columns: int) -> Tensor:
        return torch.randn(m, columns, device="cuda", dtype=torch.bfloat16)

    if operation == "merge":
        weight = weights(n)
        out = torch.empty_like(weight)
        return lambda: merge.merge_out(A, B, theta, tau, weight, out, *SETTING)
    if operation == "factor_grad":
        cols = min(n, 512)
        G, weight = weights(cols), weights(cols)
        grads = [torch.zeros(t.shape, device="cuda") for t in (A[:cols], B, theta)]
        return lambda: factor_grad.factor_grad(G, A[:cols], B, theta, tau, weight, G, *grads, *SETTING)
    if operation == "few_tokens":
        weight, x = weights(n), torch.randn(4, n, device="cuda", dtype=torch.bfloat16)
        return lambda: few_tokens.linear_few(x, weight, None, A, B, theta, tau, *SETTING)

    def select() -> Tensor:
        forget()
        return select_thresholds([Update(A, B, theta, 0.9)], *SETTING[:2])

    return select


def fastest(operation: str, cases: list[tuple[int, int, int]]) -> tuple[Row, float, float]:
    """The fastest candidate, its seconds, and those of the row in the table."""
    here = launch.row(operation, torch.empty(0, device="cuda"))
    seconds: dict[Row, float] = {}
    calls = [steps(operation, *case) for case in cases]
    for row in tqdm(dict.fromkeys([here, *candidates(operation)]), desc=operation):
        with mock.patch.dict(TABLE, {arch: {**rows, operation: row} for arch, rows in TABLE.items()}):
            try:
                seconds[row] = sum(median_seconds([call], "cuda", repetitions=7) for call in calls)
            except Exception as error:  # the compiler's and the driver's have no common class
                tqdm.write(f"{operation} {row}: {type(error).__name__}: {str(error).splitlines()[0]}")
    best = min(seconds, key=seconds.__getitem__)
    return best, seconds[best], seconds[here]


@operation_command
def main(run: Run) -> None:
    cases = [(m, n, rank) for n, m in run.shapes[:3] for rank in run.ranks]
    major, minor = torch.cuda.get_device_capability()
    found = {operation: fastest(operation, cases) for operation in CANDIDATES}
    print(f"{major * 10 + minor}: {{  # {torch.cuda.get_device_name()}")
    for operation, (row, seconds, now) in found.items():
        print(f'    "{operation}": Row{tuple(row)},  # {seconds / now:.2f} of the present row\'s time')
    print("}")


if __name__ == "__main__":
    main()
