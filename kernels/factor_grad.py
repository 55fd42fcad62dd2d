"""dA, dB and dtheta from a block of G = dY^T X, in one reading of G.

With ``H = G * gate(|K|)`` and C its slope by the pair statistic (``kappa.statistic_slope``)::

    dB = rowsum(C) * B - C A        dA = colsum(C) * A - C^T B        (distances)
    dB = C A                        dA = C^T B                        (dot products)
    dtheta = sum(H * dK/dtheta)

A program owns a rectangle of [BLOCK_M, BLOCK_N] tiles. Of each tile it reads G once, writes W0 + dW if asked (over G
itself, if asked), and adds to its share of the three sums, which no other program touches. dB needs row sums and dA
column sums of the same C, so shares are added afterwards in one fixed order: the same bits every run. A program that
owns all columns of its rows, or all rows of its columns, adds to the gradient itself. ``rectangles`` has the plan.

The two products decide nothing about survivors and run on tensor cores: for a float32 G as three tf32 products, which
keep float32's accuracy; for a half-precision G as one. The hardware cuts operands off at 2^-10, so they are rounded
first, to within 2^-11. C is rounded before its sums are taken as well: what rounding does to C then scales
``C (b - a)`` and does not stand alone where b is near a. An entry of dB is off by at most
``sum |C| (2^-11 |b - a| + 2^-11 |a|) <= 2^-10 sum |C| (|a| + |b|)``, and dA likewise, beside float32's own rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell import waves
from snell.kernels import launch, rectangles
from snell.kernels.kappa import (
    gate_value,
    inner_value,
    pair_statistic,
    pair_statistics,
    softmax_terms,
    statistic_slope,
    theta_slope,
)
from snell.kernels.merge import add_update, tile_pointers
from snell.kernels.shares import add_all_shares, add_shares, is_last
from snell.kernels.softmax import softmax_grad
from snell.spec import Spec
from snell.update import Gradients, Update

#: Groups whose norms stay in registers between K and the gradients; more are computed again.
HELD = tl.constexpr(4)

#: Outputs of a warp and shares that one step of a reduction adds: 32 numbers a thread in flight.
OUTPUTS, SHARES = 32, 32


@triton.jit
def _to_tf32(x):
    """x to the nearest number of 11 significant bits (Veltkamp's splitting); needs that nothing is fused."""
    c = x * 8193.0
    return c - (c - x)


@triton.jit
def _add_to_shares(
    H,
    statistic,
    p,
    factors,
    theta_ptr,
    shares,
    tile,
    known,
    NUM_THETA: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add a tile's part of theta's gradient and of both products, for the columns of group p.

    ``known``: the columns, rows and programs below which shares hold numbers already.
    """
    b_ptr, a_ptr, b_stride, a_stride, _ = factors
    share_a_ptr, share_b_ptr, share_theta_ptr = shares
    rows, cols, row_mask, col_mask = tile
    known_cols, known_rows, known_theta = known
    COUNT: tl.constexpr = RANK // GROUPS
    THETAS: tl.constexpr = min(NUM_THETA, 1) if NUM_THETA == GROUPS else NUM_THETA
    for t in tl.static_range(THETAS):
        theta_share = share_theta_ptr + (p if NUM_THETA == GROUPS else t)
        of_theta = tl.sum(theta_slope(H, statistic, theta_ptr, t, KERNEL))
        tl.store(theta_share, tl.load(theta_share, known_theta, 0.0) + of_theta)
    C = statistic_slope(H, statistic, theta_ptr, p, KERNEL)
    if PRECISION == "tf32":
        C = _to_tf32(C)
    cols, col_mask = tl.trans(cols), tl.trans(col_mask)
    # No stages: what would be loaded ahead is more than the registers hold beside C.
    for start in tl.range(0, COUNT, BLOCK_R, num_stages=1):
        offset = start + tl.arange(0, BLOCK_R)[None, :]
        k = p * COUNT + offset
        inside = offset < COUNT
        a = tl.load(a_ptr + cols + k * a_stride, col_mask & inside, 0.0)
        part = tl.dot(C, _to_tf32(a) if PRECISION == "tf32" else a, input_precision=PRECISION)
        b = tl.load(b_ptr + rows + k * b_stride, row_mask & inside, 0.0)
        if STATISTIC != "dot":
            part = tl.sum(C, 1)[:, None] * b - part
        ptr = share_b_ptr + rows.to(tl.int64) * RANK + k
        tl.store(ptr, tl.load(ptr, (rows < known_rows) & inside, 0.0) + part, row_mask & inside)
        part = tl.dot(tl.trans(C), _to_tf32(b) if PRECISION == "tf32" else b, input_precision=PRECISION)
        if STATISTIC != "dot":
            part = tl.sum(C, 0)[:, None] * a - part
        ptr = share_a_ptr + cols.to(tl.int64) * RANK + k
        tl.store(ptr, tl.load(ptr, (cols < known_cols) & inside, 0.0) + part, col_mask & inside)


@triton.jit
def factor_grad_kernel(
    a_ptr,
    b_ptr,
    theta_ptr,
    tau_ptr,
    max_ptr,
    halves,
    G_ptr,
    weight_ptr,
    merged_ptr,
    share_a_ptr,
    share_b_ptr,
    share_theta_ptr,
    grad_a_ptr,
    grad_b_ptr,
    grad_theta_ptr,
    arrived_ptr,
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
    tall,
    wide,
    HAS_WEIGHT: tl.constexpr,
    HAS_MERGED: tl.constexpr,
    OWNS_COLUMNS: tl.constexpr,
    OWNS_ROWS: tl.constexpr,
    ADDS: tl.constexpr,
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
    OUTPUTS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """A program owns ``tall`` by ``wide`` tiles, counted along rows of such rectangles.

    Shares: A's ``[strips of rows, n, RANK]``, B's ``[strips of columns, m, RANK]``, theta's ``[programs, NUM_THETA]``;
    A's is the gradient itself where a program owns its columns, B's where it owns its rows. With ADDS the last program
    of a strip to arrive adds the strip's shares; ``arrived`` starts at zero, a number for each strip and for all.
    """
    program = tl.program_id(0)
    across = tl.cdiv(n, BLOCK_N * wide)
    down = tl.cdiv(m, BLOCK_M * tall)
    strip, column = program // across, program % across
    height = tl.minimum(tall, tl.cdiv(m, BLOCK_M) - strip * tall)
    width = tl.minimum(wide, tl.cdiv(n, BLOCK_N) - column * wide)
    mine_a_ptr, mine_b_ptr = grad_a_ptr, grad_b_ptr
    if not OWNS_COLUMNS:
        mine_a_ptr = share_a_ptr + strip.to(tl.int64) * n * RANK
    if not OWNS_ROWS:
        mine_b_ptr = share_b_ptr + column.to(tl.int64) * m * RANK
    shares = mine_a_ptr, mine_b_ptr, share_theta_ptr + program.to(tl.int64) * NUM_THETA
    factors = b_ptr, a_ptr, b_stride, a_stride, halves
    for step in tl.range(height * width, num_stages=1, disable_licm=True):
        i, j = step % height, step // height
        rows = ((strip * tall + i) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        cols = ((column * wide + j) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        tile = rows, cols, rows < m, cols < n
        statistics = pair_statistics(factors, tile, RANK, GROUPS, STATISTIC)
        K = inner_value(statistics, theta_ptr, KERNEL)
        if max_ptr is not None:
            terms = softmax_terms(K, theta_ptr, max_ptr, tile, GROUPS)
            K = terms[0]
        gate = gate_value(K, tau_ptr, GATE)
        mask = (rows < m) & (cols < n)
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
        if max_ptr is not None:
            H = H * terms[1]
        H = tl.where(mask, H, 0.0)
        known_cols = n if OWNS_COLUMNS else tl.where(i > 0, n, 0)
        known_rows = m if OWNS_ROWS else tl.where(j > 0, m, 0)
        known = known_cols, known_rows, step > 0
        if GROUPS <= HELD:
            for p in tl.static_range(GROUPS):
                _add_to_shares(
                    H, statistics[p], p, factors, theta_ptr, shares, tile, known, NUM_THETA, RANK, GROUPS, STATISTIC,
                    KERNEL, PRECISION, BLOCK_R,
                )  # fmt: skip
        else:
            for p in tl.range(GROUPS, num_stages=1):
                statistic = pair_statistic(factors, tile, p, RANK, GROUPS, STATISTIC)
                _add_to_shares(
                    H, statistic, p, factors, theta_ptr, shares, tile, known, NUM_THETA, RANK, GROUPS, STATISTIC,
                    KERNEL, PRECISION, BLOCK_R,
                )  # fmt: skip
        # The next tile reads shares that other threads wrote.
        tl.debug_barrier()
    if ADDS:
        if not OWNS_COLUMNS:  # noqa: SIM102 (known when compiled; the other is not)
            if is_last(arrived_ptr + column, down):
                first = column * wide * BLOCK_N * RANK
                stop = tl.minimum(first + wide * BLOCK_N * RANK, n * RANK)
                add_shares(share_a_ptr, grad_a_ptr, first, stop, n * RANK, down, OUTPUTS, SHARES)
        if not OWNS_ROWS:  # noqa: SIM102
            if is_last(arrived_ptr + across + strip, across):
                first = strip * tall * BLOCK_M * RANK
                stop = tl.minimum(first + tall * BLOCK_M * RANK, m * RANK)
                add_shares(share_b_ptr, grad_b_ptr, first, stop, m * RANK, across, OUTPUTS, SHARES)
        if NUM_THETA > 0:  # noqa: SIM102
            if is_last(arrived_ptr + across + down, across * down):
                add_shares(share_theta_ptr, grad_theta_ptr, 0, NUM_THETA, NUM_THETA, across * down, 16, SHARES)


def block_r(spec: Spec) -> int:
    """Columns of the factors one product covers: 16 is the least a matrix instruction takes, and costs few registers.

    A kernel function without scalars leaves registers for twice as many, which halves the steps.
    """
    return 32 if spec.num_theta == 0 and spec.rank > 16 else 16


def factor_grad(
    G: Tensor, update: Update, grads: Gradients, weight: Tensor | None = None, merged: Tensor | None = None
) -> None:
    """Add to ``grads``, with float32 factors; G, weight and merged may have any strides."""
    A, B, theta, tau, spec, _, maxima, *_ = update
    (m, n), rank = G.shape, spec.rank
    operation = "factor_grad_many" if spec.num_statistics > 2 or maxima is not None else "factor_grad"
    row = launch.row(operation, G, update.halves)
    A, B = launch.k_major(A), launch.k_major(B)
    if not (grads.A.is_contiguous() and grads.B.is_contiguous()):
        raise ValueError("grad_A and grad_B must be contiguous")
    num_theta = theta.numel() if maxima is None else 0
    if maxima is not None:
        softmax_grad(G, update, grads)
    plan = rectangles.plan(m, n, rank, row, waves.num_processors(G.device), rectangles.budget(G))
    for start in range(0, m, plan.height):
        stop = min(start + plan.height, m)
        rows = stop - start
        down, across = -(-rows // (plan.tall * row.block_m)), -(-n // (plan.wide * row.block_n))
        parts = grads.A, grads.B[start:stop], grads.theta
        sizes = down * n * rank * (down > 1), across * rows * rank * (across > 1), down * across * num_theta
        shares = [torch.empty(size, dtype=torch.float32, device=G.device) for size in sizes]
        adds = rectangles.adds(plan, row, rank, down, across)
        arrived = torch.zeros((down + across + 1) if adds else 0, dtype=torch.int64, device=G.device)
        g, b = G[start:stop], B[start:stop]
        w, out = (g if t is None else t[start:stop] for t in (weight, merged))
        operands = A, b, theta, tau, maxima, launch.halves(update.rows(slice(start, stop))), g, w, out
        strides = (A.stride(1), b.stride(1), *g.stride(), *w.stride(), *out.stride())
        launch.run(
            factor_grad_kernel,
            down * across,
            (*operands, *shares, *parts, arrived, *strides, rows, n, plan.tall, plan.wide),
            row,
            HAS_WEIGHT=weight is not None,
            HAS_MERGED=merged is not None,
            OWNS_COLUMNS=down == 1,
            OWNS_ROWS=across == 1,
            ADDS=adds,
            NUM_THETA=num_theta,
            GATE=spec.gate,
            PRECISION="tf32" if G.element_size() == 2 else "tf32x3",
            BLOCK_R=block_r(spec),
            BLOCK_M=row.block_m,
            BLOCK_N=row.block_n,
            OUTPUTS=OUTPUTS * row.num_warps,
            SHARES=SHARES,
            **launch.meta(spec),
        )
        if not adds:
            add_all_shares(shares, parts, down, across)
