"""Kernel functions on the device: pair statistic, scalar function, gate. Every kernel calls these.

K of an entry has the same bits in every kernel. All that decides them is in this file: the rank axis is summed in
ascending order with explicit fused multiply-adds, so neither the tile nor an entry's place in it changes the order,
and every launch turns the compiler's own fusing off (``enable_fp_fusion=False``).

Distances are summed as ``(b - a)^2``. ``|b|^2 + |a|^2 - 2 a.b`` on tensor cores would be cheaper, but it cancels where
b is near a (an absolute error of 1e-7 (|a|^2 + |b|^2) under a square root), its bits depend on the instruction a tile
shape gets, and splitting, norms and a guard against the cancellation take back much of what the tensor core saves.
The price is 2 r operations an entry on the fp32 lanes: 15e9 at 28672 x 8192 and r = 32, beside 1.9e12 multiply-adds
of one GEMM of 8192 tokens on tensor cores, which are some thirty times as fast. A dot product is half of it.

Factors come k-major (one column of the rank axis contiguous, see ``launch.k_major``): a load of one k is coalesced and
16 bytes wide. Up to a rank of UNROLLED the loop is unrolled, which lets the compiler give K the layout of the tile it
is combined with; no value crosses shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The statistic each kernel function reads: ``dot`` (b . a), ``square`` (|b - a|^2) or ``norm`` (|b - a|).
STATISTICS = {"piecewise_linear": "norm", "linear": "dot", "sigmoid": "dot", "rbf": "square"}

#: The rank up to which loops are unrolled whole: 64 columns are already 80 kB of code.
UNROLLED = tl.constexpr(64)


@triton.jit
def pair_statistic(factors, tile, p, RANK: tl.constexpr, GROUPS: tl.constexpr, STATISTIC: tl.constexpr):
    """The statistic of group p.

    ``factors``: pointers to B and A and their strides from one rank column to the next. ``tile``: rows, columns and
    their masks; ``rows [M, 1]`` and ``cols [1, N]`` give [M, N] of every pair, equal shapes the pairs themselves.
    """
    b_ptr, a_ptr, b_stride, a_stride = factors
    rows, cols, row_mask, col_mask = tile
    COUNT: tl.constexpr = RANK // GROUPS
    acc = tl.zeros((row_mask & col_mask).shape, tl.float32)
    b_ptr = b_ptr + rows + p * COUNT * b_stride
    a_ptr = a_ptr + cols + p * COUNT * a_stride
    for _ in tl.range(COUNT, loop_unroll_factor=COUNT if RANK <= UNROLLED else 4):
        b = tl.load(b_ptr, row_mask, 0.0)
        a = tl.load(a_ptr, col_mask, 0.0)
        # Step by step: a loop over tiles would otherwise keep every multiple of the strides in registers.
        b_ptr += b_stride
        a_ptr += a_stride
        if STATISTIC == "dot":
            acc = tl.fma(tl.broadcast_to(b, acc.shape), tl.broadcast_to(a, acc.shape), acc)
        else:
            d = b - a
            acc = tl.fma(d, d, acc)
    return tl.sqrt(acc) if STATISTIC == "norm" else acc


@triton.jit
def pair_statistics(factors, tile, RANK: tl.constexpr, GROUPS: tl.constexpr, STATISTIC: tl.constexpr):
    """A tuple of all that K reads."""
    statistics = ()
    for p in tl.static_range(GROUPS):
        s = pair_statistic(factors, tile, p, RANK, GROUPS, STATISTIC)
        statistics = statistics + (s,)  # noqa: RUF005 (Triton's tuples have no unpacking)
    return statistics


@triton.jit
def unit_value(statistic, theta_ptr, KERNEL: tl.constexpr):
    """What sigmoid and rbf scale by alpha and shift by gamma."""
    e = tl.exp(-(tl.load(theta_ptr + 1) * statistic))
    return 1.0 / (1.0 + e) if KERNEL == "sigmoid" else e


@triton.jit
def kernel_value(statistics, theta_ptr, KERNEL: tl.constexpr):
    """K."""
    if KERNEL == "linear":
        return statistics[0]
    if KERNEL == "piecewise_linear":
        K = tl.load(theta_ptr) * statistics[0]
        for p in tl.static_range(1, len(statistics)):
            K = tl.fma(tl.zeros_like(K) + tl.load(theta_ptr + p), statistics[p], K)
        return K
    unit = unit_value(statistics[0], theta_ptr, KERNEL)
    zero = tl.zeros_like(unit)
    return tl.fma(unit, zero + tl.load(theta_ptr), zero + tl.load(theta_ptr + 2))


@triton.jit
def gate_value(K, tau_ptr, GATE: tl.constexpr):
    """The factor of K: 0 for losers, NaN for NaN."""
    a = tl.abs(K)
    if GATE == "none":
        return tl.full(K.shape, 1.0, tl.float32)
    tau = tl.load(tau_ptr)
    if GATE == "soft":
        value = a - tau
    elif GATE == "magnitude":
        value = a
    else:
        value = tl.where(a == a, 1.0, a)
    return tl.where(a <= tau, 0.0, value)


@triton.jit
def theta_slope(H, statistic, theta_ptr, t: tl.constexpr, KERNEL: tl.constexpr):
    """H * dK/dtheta_t; a kernel function of groups has one theta a group, whose slope is that of t = 0."""
    if KERNEL == "piecewise_linear":
        return H * statistic
    if t == 2:
        return H
    unit = unit_value(statistic, theta_ptr, KERNEL)
    if t == 0:
        return H * unit
    alpha = tl.load(theta_ptr)
    if KERNEL == "sigmoid":
        return H * alpha * unit * (1.0 - unit) * statistic
    return -(H * alpha * unit * statistic)


@triton.jit
def statistic_slope(H, statistic, theta_ptr, p, KERNEL: tl.constexpr):
    """C: ``H * dK`` is ``C (b - a) . d(b - a)`` for a distance, ``C d(b . a)`` for a dot product."""
    if KERNEL == "linear":
        return H
    if KERNEL == "piecewise_linear":
        return tl.where(statistic == 0.0, 0.0, tl.load(theta_ptr + p) * H / statistic)
    scale = tl.load(theta_ptr) * tl.load(theta_ptr + 1)
    unit = unit_value(statistic, theta_ptr, KERNEL)
    return H * scale * unit * (1.0 - unit) if KERNEL == "sigmoid" else -2.0 * H * scale * unit
