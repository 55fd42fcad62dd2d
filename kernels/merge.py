"""``W0 + dW`` (or dW) of a block, written once: ``dW_ij = K_ij * gate(|K_ij|)``.

A program owns one [BLOCK_M, BLOCK_N] tile: reads its weights once, adds dW in registers, writes once.
An entry whose dW is zero gets the weight's own bits. A start's K * gate is subtracted in registers too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from snell.kernels import launch
from snell.kernels.kappa import gate_value, kernel_value, less_start, pair_statistics
from snell.update import Update


@triton.jit
def add_update(weight, K, gate, out_dtype: tl.constexpr):
    """weight + K * gate, rounded once to ``out_dtype``; where the update is 0 the weight passes untouched."""
    delta = K * gate
    if weight.dtype == tl.float64 and out_dtype.primitive_bitwidth == 16:
        # By way of float32, as PyTorch narrows: the interpreter takes a double's bits for a bfloat16's.
        weight = weight.to(tl.float32)
    # Adding +0 would turn -0 into +0.
    return tl.where(delta == 0.0, weight.to(out_dtype), (weight + delta).to(out_dtype))


@triton.jit
def tile_indices(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows [BLOCK_M, 1] and columns [1, BLOCK_N] of a tile, counted along rows of tiles, and their masks."""
    across = tl.cdiv(n, BLOCK_N)
    rows = (tile // across * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = (tile % across * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    return rows, cols, rows < m, cols < n


@triton.jit
def tile_pointers(ptr, rows, cols, row_stride, col_stride):
    """Addresses of a tile's entries: 64 bits, as a matrix may hold more than 2^31."""
    return ptr + rows.to(tl.int64) * row_stride + cols.to(tl.int64) * col_stride


@triton.jit
def merge_kernel(
    a_ptr,
    b_ptr,
    theta_ptr,
    tau_ptr,
    max_ptr,
    halves,
    weight_ptr,
    out_ptr,
    a_stride,
    b_stride,
    weight_row_stride,
    weight_col_stride,
    out_row_stride,
    out_col_stride,
    m,
    n,
    start,
    HAS_WEIGHT: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tile_indices(tl.program_id(0), m, n, BLOCK_M, BLOCK_N)
    rows, cols, row_mask, col_mask = tile
    factors = b_ptr, a_ptr, b_stride, a_stride, halves
    statistics = pair_statistics(factors, tile, RANK, GROUPS, STATISTIC)
    K = kernel_value(statistics, theta_ptr, max_ptr, tile, GROUPS, KERNEL)
    gate = gate_value(K, tau_ptr, GATE)
    if start is not None:
        K = less_start(K, gate, start, tile, RANK, GROUPS, STATISTIC, KERNEL, GATE)
        gate = tl.full(K.shape, 1.0, tl.float32)
    mask = row_mask & col_mask
    out_dtype = out_ptr.dtype.element_ty
    if HAS_WEIGHT:
        weight = tl.load(tile_pointers(weight_ptr, rows, cols, weight_row_stride, weight_col_stride), mask)
        merged = add_update(weight, K, gate, out_dtype)
    else:
        merged = (K * gate).to(out_dtype)
    tl.store(tile_pointers(out_ptr, rows, cols, out_row_stride, out_col_stride), merged, mask)


def merge(update: Update, weight: Tensor | None, out: Tensor) -> None:
    """``weight + dW`` or dW into ``out``, with float32 factors; both may have any strides."""
    A, B, theta, tau, spec, _, maxima, *_ = update
    (m, n), A, B = out.shape, launch.k_major(A), launch.k_major(B)
    source = out if weight is None else weight
    row = launch.row("merge", out, update.halves)
    launch.run(
        merge_kernel,
        launch.tiles(m, n, row),
        (
            A,
            B,
            theta,
            tau,
            maxima,
            launch.halves(update),
            source,
            out,
            A.stride(1),
            B.stride(1),
            *source.stride(),
            *out.stride(),
            m,
            n,
            launch.start(update),
        ),
        row,
        HAS_WEIGHT=weight is not None,
        GATE=spec.gate,
        BLOCK_M=row.block_m,
        BLOCK_N=row.block_n,
        **launch.meta(spec),
    )
