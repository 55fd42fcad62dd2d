"""How kernels are launched: the factors' layout, the device, the table's row, no fusing behind our back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from snell.kernels.kappa import STATISTICS
from snell.kernels.table import HALVES, TABLE, Row
from snell.spec import Spec
from snell.update import Update


def k_major(factor: Tensor) -> Tensor:
    """The same [n, r] matrix with columns contiguous, copied unless it already is so.

    The layer passes factors that already are: one copy a pass serves all its blocks.
    """
    return factor if factor.stride(0) == 1 else factor.t().contiguous().t()


@cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def row(operation: str, like: Tensor, halves: tuple | None = None) -> Row:
    """The launch table's row for the device ``like`` lives on: that of the newest architecture not above it.

    Where K is computed from halves, every architecture has the same rows, and so the same instructions for K.
    """
    if halves is not None:
        return HALVES[operation]
    arch = _architecture(like.device.index) if like.is_cuda else 90
    known = [a for a in TABLE if a <= arch]
    return TABLE[max(known) if known else min(TABLE)][operation]


def meta(spec: Spec) -> dict[str, Any]:
    """What the device functions of ``kappa`` are compiled for."""
    groups, statistic = spec.num_statistics, STATISTICS[spec.kernel]
    return {"RANK": spec.rank, "GROUPS": groups, "STATISTIC": statistic, "KERNEL": spec.kernel}


def start(update: Update) -> tuple | None:
    """The factors, theta, tau, strides and halves of an update's start, as the kernels take them."""
    if update.start is None:
        return None
    A, B, theta, tau = update.start[:4]
    A, B = k_major(A), k_major(B)
    return A, B, theta, tau, update.start.smooth_max, A.stride(1), B.stride(1), halves(update.start)


def halves(update: Update) -> tuple[Tensor, Tensor, Tensor] | None:
    """The parts of B and of A and the scale, as the kernels take them."""
    if update.halves is None:
        return None
    of_A, of_B, scale = update.halves
    return of_B, of_A, scale


def tiles(m: int, n: int, row: Row) -> int:
    return -(-m // row.block_m) * -(-n // row.block_n)


def run(kernel: Any, grid: int | tuple[int, ...], args: tuple, row: Row | None = None, **meta: Any) -> None:
    """Launch ``kernel`` on the device of its first tensor and that device's current stream."""
    options: Mapping[str, Any] = {"num_warps": row.num_warps} if row is not None else {}
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        grid = grid if isinstance(grid, tuple) else (grid,)
        kernel[grid](*args, **meta, **options, enable_fp_fusion=False)
