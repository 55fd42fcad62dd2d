"""What a kernel function with a softmax has beside the others: gradients of the smooth maxima, alpha, beta and gamma.

A kernel of its own evaluates K once more for them, before G is overwritten, so that ``factor_grad`` needs no shares and
registers for a fourth gradient. It sums each column in one fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell.kernels import launch
from snell.kernels.kappa import gate_value, inner_value, pair_statistics, softmax_terms
from snell.kernels.merge import tile_pointers
from snell.update import Gradients, Update
from snell.waves import num_processors

#: Programs a multiprocessor gets.
PROGRAMS = 4


@triton.jit
def softmax_grad_kernel(
    a_ptr,
    b_ptr,
    theta_ptr,
    tau_ptr,
    max_ptr,
    halves,
    G_ptr,
    share_max_ptr,
    share_theta_ptr,
    a_stride,
    b_stride,
    G_row_stride,
    G_col_stride,
    m,
    n,
    height,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Shares ``[strips, n]`` and ``[3, strips, columns of programs]``; a program owns ``height`` tiles of a column."""
    cols = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    by_alpha = tl.zeros([BLOCK_N], tl.float32)
    by_beta = tl.zeros([BLOCK_N], tl.float32)
    by_gamma = tl.zeros([BLOCK_N], tl.float32)
    by_max = tl.zeros([BLOCK_N], tl.float32)
    first = tl.program_id(1) * height
    for i in tl.range(first, tl.minimum(first + height, tl.cdiv(m, BLOCK_M)), num_stages=1):
        rows = (i * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        tile = rows, cols, rows < m, cols < n
        factors = b_ptr, a_ptr, b_stride, a_stride, halves
        statistics = pair_statistics(factors, tile, RANK, GROUPS, STATISTIC)
        K, by_inner, exponent, unit = softmax_terms(
            inner_value(statistics, theta_ptr, KERNEL), theta_ptr, max_ptr, tile, GROUPS
        )
        gate = gate_value(K, tau_ptr, GATE)
        mask = (rows < m) & (cols < n)
        G = tl.load(tile_pointers(G_ptr, rows, cols, G_row_stride, G_col_stride), mask, 0.0)
        H = tl.where((gate == 0.0) | (mask == 0), 0.0, G.to(tl.float32) * gate)
        slope = tl.where(mask, H * (by_inner - 1.0), 0.0)
        by_alpha += tl.sum(tl.where(mask, H * unit, 0.0), 0)
        by_beta += tl.sum(H, 0)
        by_gamma -= tl.sum(tl.where(mask, slope * exponent, 0.0), 0)
        by_max -= tl.sum(slope, 0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(share_max_ptr + tl.program_id(1).to(tl.int64) * n + column, by_max, column < n)
    size = tl.num_programs(0) * tl.num_programs(1)
    share_theta_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(share_theta_ptr, tl.sum(by_alpha))
    tl.store(share_theta_ptr + size, tl.sum(by_beta))
    tl.store(share_theta_ptr + 2 * size, tl.sum(by_gamma))


def softmax_grad(G: Tensor, update: Update, grads: Gradients) -> None:
    """Add to the gradients of the smooth maxima, alpha, beta and gamma."""
    A, B, theta, tau, spec, _, maxima, *_ = update
    (m, n), A, B = G.shape, launch.k_major(A), launch.k_major(B)
    assert grads.smooth_max is not None
    row = launch.row("softmax_grad", G, update.halves)
    across, tiles = -(-n // row.block_n), -(-m // row.block_m)
    strips = min(tiles, max(1, PROGRAMS * num_processors(G.device) // across))
    height = -(-tiles // strips)
    strips = -(-tiles // height)
    shares = torch.empty(strips, n, dtype=torch.float32, device=G.device)
    of_theta = torch.empty(3, strips * across, dtype=torch.float32, device=G.device)
    strides = A.stride(1), B.stride(1), *G.stride()
    launch.run(
        softmax_grad_kernel,
        (across, strips),
        (A, B, theta, tau, maxima, launch.halves(update), G, shares, of_theta, *strides, m, n, height),
        row,
        GATE=spec.gate,
        BLOCK_M=row.block_m,
        BLOCK_N=row.block_n,
        **launch.meta(spec),
    )
    grads.smooth_max.add_(shares.sum(0))
    grads.theta[-3:].add_(of_theta.sum(1))
