"""dA, dB and dtheta from a block of G = dY^T X, in one reading of G.

With ``H = G * gate(|K|)`` and C its slope by the pair statistic (``kappa.statistic_slope``)::

    dB = rowsum(C) * B - C A        dA = colsum(C) * A - C^T B        (distances)
    dB = C A                        dA = C^T B                        (dot products)
    dtheta = sum(H * dK/dtheta)

A program owns one [BLOCK_M, BLOCK_N] tile: it reads G once, writes W0 + dW of the same tile if asked
(over G itself, if asked), and leaves its share of the three sums in a workspace of its own. dB needs row
sums and dA column sums of the same C; no program can own both, so shares are added afterwards, by one
program an output, always in the same order: the same bits every run, without atomics.

The two products decide nothing about survivors and run on tensor cores: for a float32 G as three tf32
products, which keep float32's accuracy; for a half-precision G as one, whose rounding (2^-11) is below what
G itself was rounded by (2^-9 or 2^-11). Shares take ``r (1/BLOCK_M + 1/BLOCK_N)`` numbers an entry, so the
launcher goes by bands of rows that keep them within WORKSPACE_BYTES, which stay in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell.kernels import launch
from snell.kernels.kappa import gate_value, kernel_value, pair_statistic, pair_statistics, statistic_slope, theta_slope
from snell.kernels.merge import add_update, tile_indices, tile_pointers
from snell.spec import Spec
from snell.update import Gradients, Update

#: Shares of one band. Small beside a 40 MiB L2 cache, yet 650 tiles of work at r = 32.
WORKSPACE_BYTES = 8 * 2**20

#: Groups whose norms stay in registers between K and the gradients; more are computed again.
HELD = tl.constexpr(4)

#: Outputs of one reducing program, and shares it adds at a time.
REDUCE_OUTPUTS = 64
REDUCE_SHARES = 32


@triton.jit
def _leave_shares(
    H,
    statistic,
    p,
    factors,
    theta_ptr,
    shares,
    tile,
    NUM_THETA: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """This tile's share of theta's gradient and of both products, for the columns of group p."""
    b_ptr, a_ptr, b_stride, a_stride = factors
    share_a_ptr, share_b_ptr, share_theta_ptr = shares
    rows, cols, row_mask, col_mask = tile
    COUNT: tl.constexpr = RANK // GROUPS
    if NUM_THETA == GROUPS:
        tl.store(share_theta_ptr + p, tl.sum(theta_slope(H, statistic, theta_ptr, 0, KERNEL)))
    else:
        for t in tl.static_range(NUM_THETA):
            tl.store(share_theta_ptr + t, tl.sum(theta_slope(H, statistic, theta_ptr, t, KERNEL)))
    C = statistic_slope(H, statistic, theta_ptr, p, KERNEL)
    cols, col_mask = tl.trans(cols), tl.trans(col_mask)
    # No stages: what would be loaded ahead is more than the registers hold beside C.
    for start in tl.range(0, COUNT, BLOCK_R, num_stages=1):
        offset = start + tl.arange(0, BLOCK_R)[None, :]
        k = p * COUNT + offset
        a_mask = col_mask & (offset < COUNT)
        b_mask = row_mask & (offset < COUNT)
        a = tl.load(a_ptr + cols + k * a_stride, a_mask, 0.0)
        grad_b = tl.dot(C, a, input_precision=PRECISION)
        b = tl.load(b_ptr + rows + k * b_stride, b_mask, 0.0)
        if STATISTIC != "dot":
            grad_b = tl.sum(C, 1)[:, None] * b - grad_b
        tl.store(share_b_ptr + rows.to(tl.int64) * RANK + k, grad_b, b_mask)
        grad_a = tl.dot(tl.trans(C), b, input_precision=PRECISION)
        if STATISTIC != "dot":
            grad_a = tl.sum(C, 0)[:, None] * a - grad_a
        tl.store(share_a_ptr + cols.to(tl.int64) * RANK + k, grad_a, a_mask)


@triton.jit
def factor_grad_kernel(
    a_ptr,
    b_ptr,
    theta_ptr,
    tau_ptr,
    G_ptr,
    weight_ptr,
    merged_ptr,
    share_a_ptr,
    share_b_ptr,
    share_theta_ptr,
    a_stride,
    b_stride,
    G_row_stride,
    G_col_stride,
    weight_row_stride,
    weight_col_stride,
    merged_row_stride,
    merged_col_stride,
    m,
    n,
    HAS_WEIGHT: tl.constexpr,
    HAS_MERGED: tl.constexpr,
    NUM_THETA: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Shares: A's ``[row tiles, n, RANK]``, B's ``[column tiles, m, RANK]``, theta's ``[tiles, NUM_THETA]``."""
    program = tl.program_id(0)
    tile = tile_indices(program, m, n, BLOCK_M, BLOCK_N)
    rows, cols, row_mask, col_mask = tile
    factors = b_ptr, a_ptr, b_stride, a_stride
    statistics = pair_statistics(factors, tile, RANK, GROUPS, STATISTIC)
    K = kernel_value(statistics, theta_ptr, KERNEL)
    gate = gate_value(K, tau_ptr, GATE)
    mask = row_mask & col_mask
    G = tl.load(tile_pointers(G_ptr, rows, cols, G_row_stride, G_col_stride), mask, 0.0)
    H = tl.where(gate == 0.0, 0.0, G.to(tl.float32) * gate)
    if HAS_MERGED:
        # Every thread has its part of G before any of it is overwritten, whatever layouts the two got.
        tl.debug_barrier()
        out_dtype = merged_ptr.dtype.element_ty
        if HAS_WEIGHT:
            weight = tl.load(tile_pointers(weight_ptr, rows, cols, weight_row_stride, weight_col_stride), mask)
            merged = add_update(weight, K, gate, out_dtype)
        else:
            merged = (K * gate).to(out_dtype)
        tl.store(tile_pointers(merged_ptr, rows, cols, merged_row_stride, merged_col_stride), merged, mask)
    # Padding has factors of 0, and so may have a K of its own: its H must not count.
    H = tl.where(mask, H, 0.0)
    across = tl.cdiv(n, BLOCK_N)
    share_a_ptr += (program // across).to(tl.int64) * n * RANK
    share_b_ptr += (program % across).to(tl.int64) * m * RANK
    share_theta_ptr += program.to(tl.int64) * NUM_THETA
    shares = share_a_ptr, share_b_ptr, share_theta_ptr
    if GROUPS <= HELD:
        for p in tl.static_range(GROUPS):
            _leave_shares(
                H, statistics[p], p, factors, theta_ptr, shares, tile, NUM_THETA, RANK, GROUPS, STATISTIC, KERNEL,
                PRECISION, BLOCK_R,
            )  # fmt: skip
    else:
        for p in tl.range(GROUPS, num_stages=1):
            statistic = pair_statistic(factors, tile, p, RANK, GROUPS, STATISTIC)
            _leave_shares(
                H, statistic, p, factors, theta_ptr, shares, tile, NUM_THETA, RANK, GROUPS, STATISTIC, KERNEL,
                PRECISION, BLOCK_R,
            )  # fmt: skip


@triton.jit
def _add_shares(share_ptr, grad_ptr, start, size, shares, OUTPUTS: tl.constexpr, SHARES: tl.constexpr):
    i = start.to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([SHARES, OUTPUTS], tl.float32)
    for first in range(0, shares, SHARES):
        s = first + tl.arange(0, SHARES)
        mask = (s < shares)[:, None] & (i < size)[None, :]
        total += tl.load(share_ptr + s.to(tl.int64)[:, None] * size + i[None, :], mask, 0.0)
    grad = tl.load(grad_ptr + i, i < size)
    tl.store(grad_ptr + i, grad + tl.sum(total, 0), i < size)


@triton.jit
def add_shares_kernel(
    share_a_ptr,
    share_b_ptr,
    share_theta_ptr,
    grad_a_ptr,
    grad_b_ptr,
    grad_theta_ptr,
    size_a,
    size_b,
    size_theta,
    shares_a,
    shares_b,
    OUTPUTS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """grad += its shares, summed in one fixed order; a program owns OUTPUTS numbers of one gradient."""
    program = tl.program_id(0)
    programs_a, programs_b = tl.cdiv(size_a, OUTPUTS), tl.cdiv(size_b, OUTPUTS)
    if program < programs_a:
        _add_shares(share_a_ptr, grad_a_ptr, program, size_a, shares_a, OUTPUTS, SHARES)
    elif program < programs_a + programs_b:
        _add_shares(share_b_ptr, grad_b_ptr, program - programs_a, size_b, shares_b, OUTPUTS, SHARES)
    else:
        start = program - programs_a - programs_b
        _add_shares(share_theta_ptr, grad_theta_ptr, start, size_theta, shares_a * shares_b, OUTPUTS, SHARES)


def block_r(spec: Spec) -> int:
    """Columns of the factors one product covers: 16 is the least a matrix instruction takes."""
    return 16 if spec.rank // spec.num_statistics <= 16 else 32


def factor_grad(
    G: Tensor, update: Update, grads: Gradients, weight: Tensor | None = None, merged: Tensor | None = None
) -> None:
    """Add to ``grads``, with float32 factors; G, weight and merged may have any strides."""
    A, B, theta, tau, spec = update
    (m, n), rank = G.shape, spec.rank
    row = launch.row("factor_grad_many" if spec.num_statistics > 2 else "factor_grad", G)
    A, B = launch.k_major(A), launch.k_major(B)
    across = -(-n // row.block_n)
    # Numbers one band of block_m rows leaves behind, and how many bands a workspace holds.
    band = row.block_m * rank * across + n * rank + across * theta.numel()
    height = row.block_m * max(1, WORKSPACE_BYTES // (4 * band))
    if not (grads.A.is_contiguous() and grads.B.is_contiguous()):
        raise ValueError("grad_A and grad_B must be contiguous")
    for start in range(0, m, height):
        stop = min(start + height, m)
        rows, down = stop - start, -(-(stop - start) // row.block_m)
        shares = [G.new_empty(size, dtype=torch.float32) for size in (down * n * rank, across * rows * rank)]
        shares.append(G.new_empty(down * across * theta.numel(), dtype=torch.float32))
        g, b = G[start:stop], B[start:stop]
        w = g if weight is None else weight[start:stop]
        out = g if merged is None else merged[start:stop]
        strides = (A.stride(1), b.stride(1), *g.stride(), *w.stride(), *out.stride())
        launch.run(
            factor_grad_kernel,
            down * across,
            (A, b, theta, tau, g, w, out, *shares, *strides, rows, n),
            row,
            HAS_WEIGHT=weight is not None,
            HAS_MERGED=merged is not None,
            NUM_THETA=theta.numel(),
            GATE=spec.gate,
            PRECISION="tf32" if G.element_size() == 2 else "tf32x3",
            BLOCK_R=block_r(spec),
            BLOCK_M=row.block_m,
            BLOCK_N=row.block_n,
            **launch.meta(spec),
        )
        band_grads = grads.A, grads.B[start:stop], grads.theta
        sizes = [grad.numel() for grad in band_grads]
        launch.run(
            add_shares_kernel,
            sum(-(-size // REDUCE_OUTPUTS) for size in sizes),
            (*shares, *band_grads, *sizes, down, across),
            OUTPUTS=REDUCE_OUTPUTS,
            SHARES=REDUCE_SHARES,
        )
