"""The factors' high and low parts, as :mod:`snell.kernels.halves` reads them: made once a pass, in three launches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell.kernels import launch
from snell.kernels.halves import TOP, padded, width
from snell.spec import Spec

_enabled = os.environ.get("SNELL_TENSOR_CORES") == "1"


def enabled() -> bool:
    """Whether K is computed on tensor cores: SNELL_TENSOR_CORES=1 in the environment, or :func:`use`."""
    return _enabled


@contextmanager
def use(on: bool) -> Iterator[None]:
    """Compute K on tensor cores, or not, inside the context. Thresholds selected outside are not for it."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


#: Rows that one program of either kernel takes at a time.
BLOCK = 1024


@triton.jit
def centre_kernel(
    a_ptr, b_ptr, shift_ptr, top_ptr, a_stride, b_stride, n, m, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):
    """The mean of one rank column over all rows of both factors, and how far a row of it is from that.

    A program owns a column. Numbers that are infinite or NaN count as 0.
    """
    a_ptr += tl.program_id(0) * a_stride
    b_ptr += tl.program_id(0) * b_stride
    share = 1.0 / (n + m).to(tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    least, most = mean + float("inf"), mean - float("inf")
    for start in range(0, n + m, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(tl.where(i < n, a_ptr + i, b_ptr + (i - n)), i < n + m, 0.0)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        # Each times its share: a sum of large numbers would overflow.
        mean += x * share
        least, most = tl.minimum(least, x), tl.maximum(most, x)
    shift = tl.sum(mean) if CENTRED else 0.0
    tl.store(shift_ptr + tl.program_id(0), shift)
    tl.store(top_ptr + tl.program_id(0), tl.maximum(tl.max(most) - shift, shift - tl.min(least)))


@triton.jit
def split_kernel(
    x_ptr, shift_ptr, top_ptr, out_ptr, scale_ptr, stride, length, by,
    RANK: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, STATISTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of one factor, ``by`` times them for the products; a program owns BLOCK rows."""
    COUNT: tl.constexpr = RANK // GROUPS
    PADDED: tl.constexpr = padded(COUNT)
    WIDTH: tl.constexpr = width(RANK, GROUPS)
    columns = tl.arange(0, COLUMNS)
    top = tl.max(tl.load(top_ptr + columns, columns < RANK, 0.0))
    exponent = tl.minimum(126 + TOP + 127 - (top.to(tl.int32, bitcast=True) >> 23), 253)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
        tl.store(scale_ptr + 1, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < length
    out_ptr += i.to(tl.int64) * WIDTH
    for p in range(GROUPS):
        norm = tl.zeros([BLOCK], tl.float32)
        for k in range(COUNT):
            column = p * COUNT + k
            x = (tl.load(x_ptr + column * stride + i, mask, 0.0) - tl.load(shift_ptr + column)) * scale
            if STATISTIC == "dot":
                norm = tl.maximum(norm, tl.where(x == x, tl.abs(x), float("inf")))
            else:
                norm = tl.fma(x, x, norm)
            high = (x * by).to(tl.float16)
            tl.store(out_ptr + 2 * p * PADDED + k, high, mask)
            tl.store(out_ptr + (2 * p + 1) * PADDED + k, (x * by - high.to(tl.float32)).to(tl.float16), mask)
        # NaN is as far away as infinity.
        norm = tl.where(norm == norm, norm, float("inf"))
        tl.store((out_ptr + 2 * GROUPS * PADDED).to(tl.pointer_type(tl.float32), bitcast=True) + p, norm, mask)


def split(A: Tensor, B: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of ``A [n, r]`` and ``B [m, r]``, a row of half-precision numbers for each of theirs; and the scale.

    They belong to these factors as a whole: K of a block has the whole's bits if its parts are rows of the whole's.
    """
    A, B = launch.k_major(A), launch.k_major(B)
    (n, rank), m, groups = A.shape, B.shape[0], spec.num_statistics
    meta = launch.meta(spec)
    parts = [torch.zeros(lines, width(rank, groups), dtype=torch.float16, device=A.device) for lines in (n, m)]
    shift, top = torch.empty(2, rank, dtype=torch.float32, device=A.device)
    scale = torch.empty(2, dtype=torch.float32, device=A.device)
    centred = meta["STATISTIC"] != "dot"
    launch.run(centre_kernel, rank, (A, B, shift, top, A.stride(1), B.stride(1), n, m), CENTRED=centred, BLOCK=BLOCK)
    for factor, part, by in ((A, parts[0], -2.0 if centred else 1.0), (B, parts[1], 1.0)):
        sizes = factor.stride(1), len(factor), by
        launch.run(
            split_kernel,
            -(-len(factor) // BLOCK),
            (factor, shift, top, part, scale, *sizes),
            RANK=rank,
            GROUPS=groups,
            COLUMNS=triton.next_power_of_2(rank),
            STATISTIC=meta["STATISTIC"],
            BLOCK=BLOCK,
        )
    return parts[0], parts[1], scale
