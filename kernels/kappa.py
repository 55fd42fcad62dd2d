"""Kernel functions on the device: pair statistic, scalar function, gate. Every kernel calls these.

K of an entry has the same bits in every kernel. All that decides them is in this file: the rank axis is summed in
ascending order with explicit fused multiply-adds, so neither the tile nor an entry's place in it changes the order,
and every launch turns the compiler's own fusing off (``enable_fp_fusion=False``).

Distances are summed as ``(b - a)^2``, at the price of 2 r operations an entry on the fp32 lanes; a dot product is half
of it. Where factors come with halves, ``halves`` computes the statistics on tensor cores instead, for every kernel.

Factors come k-major (one column of the rank axis contiguous, see ``launch.k_major``): a load of one k is coalesced and
16 bytes wide. Up to a rank of UNROLLED the loop is unrolled, which lets the compiler give K the layout of the tile it
is combined with; no value crosses shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snell.kernel_functions import GAMMA_LEAST
from snell.kernels.halves import halves_statistic

#: The statistic each kernel function reads: ``dot`` (b . a), ``square`` (|b - a|^2) or ``norm`` (|b - a|).
STATISTICS = {"piecewise_linear": "norm", "linear": "dot", "sigmoid": "dot", "rbf": "square", "mixture": "norm"}

#: The least \|gamma\| of a softmax: GAMMA_LEAST of ``snell.kernel_functions``.
_LEAST = tl.constexpr(GAMMA_LEAST)

#: The rank up to which loops are unrolled whole: 64 columns are already 80 kB of code.
UNROLLED = tl.constexpr(64)


@triton.jit
def pair_statistic(factors, tile, p, RANK: tl.constexpr, GROUPS: tl.constexpr, STATISTIC: tl.constexpr):
    """The statistic of group p.

    ``factors``: pointers to B and A, their strides from one rank column to the next, and their halves or None.
    ``tile``: rows, columns and their masks; ``rows [M, 1]`` and ``cols [1, N]`` give [M, N] of every pair. Equal shapes
    give the pairs themselves, without halves.
    """
    if factors[4] is not None:
        return halves_statistic(factors, tile, p, RANK, GROUPS, STATISTIC)
    else:
        return direct_statistic(factors, tile, p, RANK, GROUPS, STATISTIC)


@triton.jit
def direct_statistic(factors, tile, p, RANK: tl.constexpr, GROUPS: tl.constexpr, STATISTIC: tl.constexpr):
    b_ptr, a_ptr, b_stride, a_stride, _ = factors
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


# A kernel function takes the statistic of group p, K of the groups before p, and H = G * gate(|K|). It returns three
# things: K with group p; C, which is H times K's slope by the statistic, such that ``H * dK`` is
# ``C (b - a) . d(b - a)`` for a distance and ``C d(b . a)`` for a dot product; and H times K's slopes by the group's
# entries of theta. A caller takes what it needs, and the compiler drops the rest.


@triton.jit
def piecewise_linear(norm, theta_ptr, p, K, H):
    alpha = tl.zeros_like(norm) + tl.load(theta_ptr + p)
    return tl.fma(alpha, norm, K), tl.where(norm == 0.0, 0.0, alpha * H / norm), (H * norm,)


@triton.jit
def linear(dot, theta_ptr, p, K, H):
    return dot, H, ()


@triton.jit
def sigmoid(dot, theta_ptr, p, K, H):
    alpha, beta, gamma = scalars(theta_ptr, dot)
    unit = 1.0 / (1.0 + tl.exp(-(beta * dot)))
    C = H * (alpha * beta) * unit * (1.0 - unit)
    return tl.fma(unit, alpha, gamma), C, (H * unit, H * alpha * unit * (1.0 - unit) * dot, H)


@triton.jit
def rbf(square, theta_ptr, p, K, H):
    alpha, beta, gamma = scalars(theta_ptr, square)
    unit = tl.exp(-(beta * square))
    C = -2.0 * H * (alpha * beta) * unit
    return tl.fma(unit, alpha, gamma), C, (H * unit, -(H * alpha * unit * square), H)


@triton.jit
def scalars(theta_ptr, statistic):
    """alpha, beta and gamma, each as a tile like the statistic's."""
    zero = tl.zeros_like(statistic)
    return zero + tl.load(theta_ptr), zero + tl.load(theta_ptr + 1), zero + tl.load(theta_ptr + 2)


@triton.jit
def kernel_function(statistic, theta_ptr, p, K, H, KERNEL: tl.constexpr):
    """The one of that name."""
    if KERNEL == "piecewise_linear":
        return piecewise_linear(statistic, theta_ptr, p, K, H)
    if KERNEL == "linear":
        return linear(statistic, theta_ptr, p, K, H)
    if KERNEL == "sigmoid":
        return sigmoid(statistic, theta_ptr, p, K, H)
    if KERNEL == "rbf":
        return rbf(statistic, theta_ptr, p, K, H)
    if KERNEL == "mixture":
        return piecewise_linear(statistic, theta_ptr, p, K, H)


@triton.jit
def inner_value(statistics, theta_ptr, KERNEL: tl.constexpr):
    """K, or what is under the softmax."""
    K = tl.zeros_like(statistics[0])
    for p in tl.static_range(len(statistics)):
        terms = kernel_function(statistics[p], theta_ptr, p, K, K, KERNEL)
        K = terms[0]
    return K


@triton.jit
def softmax_terms(K, theta_ptr, max_ptr, tile, GROUPS: tl.constexpr):
    """K + alpha S + beta, its slope by K, the exponent (K - L) / gamma with the columns' smooth maxima L, and S."""
    zero = tl.zeros_like(K)
    alpha, beta, gamma = scalars(theta_ptr + GROUPS, zero)
    gamma = tl.where(tl.abs(gamma) < _LEAST, tl.where(gamma < 0.0, -_LEAST, _LEAST), gamma)
    exponent = (K - tl.load(max_ptr + tile[1], tile[3], 0.0)) / gamma
    unit = tl.exp(exponent)
    return tl.fma(alpha, unit, K) + beta, 1.0 + alpha * unit / gamma, exponent, unit


@triton.jit
def kernel_value(statistics, theta_ptr, max_ptr, tile, GROUPS: tl.constexpr, KERNEL: tl.constexpr):
    """K."""
    K = inner_value(statistics, theta_ptr, KERNEL)
    if max_ptr is not None:
        terms = softmax_terms(K, theta_ptr, max_ptr, tile, GROUPS)
        K = terms[0]
    return K


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
def less_start(
    K,
    gate,
    start,
    tile,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    GATE: tl.constexpr,
):
    """K * gate less the same of the start's entries (``launch.start``): 0 where both are equal."""
    a_ptr, b_ptr, theta_ptr, tau_ptr, max_ptr, a_stride, b_stride, halves = start
    factors = b_ptr, a_ptr, b_stride, a_stride, halves
    statistics = pair_statistics(factors, tile, RANK, GROUPS, STATISTIC)
    first = kernel_value(statistics, theta_ptr, max_ptr, tile, GROUPS, KERNEL)
    return K * gate - first * gate_value(first, tau_ptr, GATE)


@triton.jit
def theta_slope(H, statistic, theta_ptr, t: tl.constexpr, KERNEL: tl.constexpr):
    """H * dK/dtheta_t; a kernel function of groups has one theta a group, whose slope is that of t = 0."""
    terms = kernel_function(statistic, theta_ptr, 0, H, H, KERNEL)
    return terms[2][t]


@triton.jit
def statistic_slope(H, statistic, theta_ptr, p, KERNEL: tl.constexpr):
    """C of group p."""
    terms = kernel_function(statistic, theta_ptr, p, H, H, KERNEL)
    return terms[1]
