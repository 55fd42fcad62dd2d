"""``y = x (W0 + dW)^T + bias`` for a few tokens, W0 read once and nothing but y written.

Building W0 + dW would move three times the bytes of the product it serves. A program owns BLOCK_M outputs
and every num_programs(1)-th tile of their columns: it adds dW to the weights in registers, rounds to x's
dtype as the layer's blocks do, and multiplies with the tokens on tensor cores. Programs that share outputs
leave their sums in a small workspace, added in a fixed order by :func:`add_splits_kernel`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell import waves
from snell.kernels import launch
from snell.kernels.kappa import gate_value, kernel_value, less_start, pair_statistics
from snell.kernels.merge import add_update, tile_pointers
from snell.update import Update

#: Tokens of one product: what a matrix instruction takes at least, and the most this kernel serves.
TOKENS = 16

#: Programs a multiprocessor gets, so that enough reads of W0 are in flight.
PROGRAMS = 4


@triton.jit
def few_tokens_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    theta_ptr,
    tau_ptr,
    max_ptr,
    halves,
    weight_ptr,
    split_ptr,
    a_stride,
    b_stride,
    weight_row_stride,
    weight_col_stride,
    tokens,
    m,
    n,
    still,
    start,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    GATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over this program's columns, ``[splits, tokens, m]`` float32; x is [tokens, n], contiguous."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    row_mask = rows < m
    token = tl.arange(0, TOKENS)[None, :]
    y = tl.zeros([BLOCK_M, TOKENS], tl.float32)
    # One stage: the compiler would stage the factors of tiles to come in shared memory and registers, and spill.
    for tile in tl.range(tl.program_id(1), tl.cdiv(n, BLOCK_N), tl.num_programs(1), num_stages=1):
        cols = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        col_mask = cols < n
        # By 0, which the compiler cannot know: or it keeps every number of B's rows in registers, and spills.
        rows += still
        factors, indices = (b_ptr, a_ptr, b_stride, a_stride, halves), (rows, cols, row_mask, col_mask)
        statistics = pair_statistics(factors, indices, RANK, GROUPS, STATISTIC)
        K = kernel_value(statistics, theta_ptr, max_ptr, indices, GROUPS, KERNEL)
        gate = gate_value(K, tau_ptr, GATE)
        if start is not None:
            K = less_start(K, gate, start, indices, RANK, GROUPS, STATISTIC, KERNEL, GATE)
            gate = tl.full(K.shape, 1.0, tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(
                tile_pointers(weight_ptr, rows, cols, weight_row_stride, weight_col_stride), row_mask & col_mask, 0.0
            )
            merged = add_update(weight, K, gate, x_ptr.dtype.element_ty)
        else:
            merged = (K * gate).to(x_ptr.dtype.element_ty)
        # Padding has factors of 0, and a K of its own, which may be infinite or NaN.
        merged = tl.where(col_mask, merged, 0.0)
        k = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        x = tl.load(x_ptr + token.to(tl.int64) * n + k, (token < tokens) & (k < n), 0.0)
        # Half-precision numbers are tf32 numbers: one product is exact for them, float32 takes three.
        y = tl.dot(merged.to(tl.float32), x.to(tl.float32), y, input_precision=PRECISION)
    split = (tl.program_id(1) * tokens + token).to(tl.int64) * m
    tl.store(split_ptr + split + rows, y, row_mask & (token < tokens))


@triton.jit
def add_splits_kernel(split_ptr, bias_ptr, y_ptr, splits, size, m, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = bias + the splits in order; a program owns BLOCK numbers of y."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(split_ptr + split * size + i, i < size, 0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % m, i < size, 0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), i < size)


def linear_few(x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor:
    """y [tokens, m] of ``x [tokens, n]``, tokens <= TOKENS, with float32 factors and x below float64."""
    A, B, theta, tau, spec, _, maxima, *_ = update
    (tokens, n), m = x.shape, B.shape[0]
    row = launch.row("few_tokens", x, update.halves)
    x, A, B = x.contiguous(), launch.k_major(A), launch.k_major(B)
    across, down = -(-n // row.block_n), -(-m // row.block_m)
    splits = min(across, max(1, -(-PROGRAMS * waves.num_processors(x.device) // down)))
    sums = x.new_empty(splits * tokens * m, dtype=torch.float32)
    y = x.new_empty(tokens, m)
    source, start = x if weight is None else weight, launch.start(update)
    launch.run(
        few_tokens_kernel,
        (down, splits),
        (
            *(x, A, B, theta, tau, maxima, launch.halves(update), source, sums),
            *(A.stride(1), B.stride(1), *source.stride(), tokens, m, n, 0, start),
        ),
        row,
        GATE=spec.gate,
        HAS_WEIGHT=weight is not None,
        PRECISION="tf32" if x.element_size() == 2 else "tf32x3",
        TOKENS=TOKENS,
        BLOCK_M=row.block_m,
        BLOCK_N=row.block_n,
        **launch.meta(spec),
    )
    launch.run(
        add_splits_kernel,
        -(-y.numel() // 256),
        (sums, y if bias is None else bias, y, splits, y.numel(), m),
        HAS_BIAS=bias is not None,
        BLOCK=256,
    )
    return y
