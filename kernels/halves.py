"""K's pair statistics on tensor cores, from factors that are sums of two half-precision numbers each.

``kappa.direct_statistic`` takes 2 r instructions of the fp32 lanes an entry. Here a and b are the factors less the mean
of all their rows, times a power of two, with ``x = hi + lo`` in half precision::

    |b - a|^2 = (|b|^2 + |a|^2) + bhi (-2a)hi + blo (-2a)hi + bhi (-2a)lo

in one float32 accumulator, 16 rank columns at a time. It cancels where b is near a: an entry with ``|b - a|^2`` below
GUARD of ``|b|^2 + |a|^2`` takes direct differences instead, and so does one that half precision holds too coarsely, or
that is infinite or NaN. That is decided by the entry's own numbers alone, so every kernel decides alike. A dot product
has no norms, no mean and no factor of -2; rows of it that are too small for the power of two are taken directly.

With ``N = |b|^2 + |a|^2`` and COUNT rank columns a group, ``|b - a|^2`` is off by at most ``(6 + COUNT / 2) 2^-22 N``
where sums round to nearest: 3 for what the parts leave out, COUNT / 4 each for norms and products, the rest for the
sums of the four. Tensor cores cut off what they add: four times as much bounds them, if they cut at 2^-24 of the
largest that they add. A dot product is off by at most the same share of COUNT times the largest of ``|b|`` times the
largest of ``|a|``.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The share of both squared norms below which a squared distance is taken directly.
GUARD = tl.constexpr(1.0 / 16)

#: Rank columns of one product: what a matrix instruction takes. Groups are padded to a multiple of it.
STEP = tl.constexpr(16)

#: Scaled factors are below 2^TOP: -2a has room in half precision, and numbers 2^17 times smaller keep all 22 bits.
TOP = tl.constexpr(14)


@triton.constexpr_function
def padded(count):
    """Columns of a group of ``count`` rank columns: whole steps."""
    return -(-count // 16) * 16


@triton.constexpr_function
def width(rank, groups):
    """Half-precision numbers of a row: a group's high parts, its low parts, and so on; then float32 norms, padded."""
    return 2 * groups * padded(rank // groups) + -(-groups // 4) * 8


@triton.jit
def halves_statistic(factors, tile, p, RANK: tl.constexpr, GROUPS: tl.constexpr, STATISTIC: tl.constexpr):
    """The statistic of group p, as ``kappa.pair_statistic``, for every pair of rows ``[M, 1]`` and columns ``[1, N]``.

    The factors' halves: pointers to B's and A's parts and to the power of two and its inverse.
    """
    b_ptr, a_ptr, scale_ptr = factors[4]
    rows, cols, row_mask, col_mask = tile
    PADDED: tl.constexpr = padded(RANK // GROUPS)
    WIDTH: tl.constexpr = width(RANK, GROUPS)
    b_ptr += rows.to(tl.int64) * WIDTH
    a_ptr += cols.to(tl.int64) * WIDTH
    b_norm_ptr = (b_ptr + 2 * GROUPS * PADDED).to(tl.pointer_type(tl.float32), bitcast=True)
    a_norm_ptr = (a_ptr + 2 * GROUPS * PADDED).to(tl.pointer_type(tl.float32), bitcast=True)
    bb = tl.load(b_norm_ptr + p, row_mask, 0.0)
    aa = tl.load(a_norm_ptr + p, col_mask, 0.0)
    b_ptr += 2 * p * PADDED + tl.arange(0, STEP)[None, :]
    a_ptr += 2 * p * PADDED + tl.arange(0, STEP)[:, None]
    acc = tl.zeros((row_mask & col_mask).shape, tl.float32)
    if STATISTIC != "dot":
        acc = bb + aa
    for _ in tl.static_range(PADDED // STEP):
        b, a = tl.load(b_ptr, row_mask, 0.0), tl.load(a_ptr, col_mask, 0.0)
        acc = tl.dot(b, a, acc)
        acc = tl.dot(tl.load(b_ptr + PADDED, row_mask, 0.0), a, acc)
        acc = tl.dot(b, tl.load(a_ptr + PADDED, col_mask, 0.0), acc)
        b_ptr += STEP
        a_ptr += STEP
    # First whether the tile may hold such entries, then which they are. Never "less than": NaN is not less.
    if STATISTIC == "dot":
        low_b = (bb < 1.0) & (bb != 0.0) | (bb == float("inf"))
        low_a = (aa < 1.0) & (aa != 0.0) | (aa == float("inf"))
        clear = tl.max(low_b.to(tl.int32)) + tl.max(low_a.to(tl.int32)) == 0
    else:
        clear = tl.min(acc) >= _least(tl.max(bb), tl.max(aa), RANK // GROUPS)
    if clear == 0:
        low = low_b | low_a if STATISTIC == "dot" else (acc >= _least(bb, aa, RANK // GROUPS)) == 0
        acc = tl.where(low, _again(factors, tile, p, tl.load(scale_ptr), RANK, GROUPS, STATISTIC), acc)
    unscale = tl.load(scale_ptr + 1)
    if STATISTIC == "norm":
        return tl.sqrt(acc) * unscale
    return acc * unscale * unscale


@triton.jit
def _least(bb, aa, COUNT: tl.constexpr):
    """The least squared distance that the parts are good for; below COUNT, those of numbers near 0 are too coarse."""
    return tl.maximum(bb * GUARD, COUNT) + aa * GUARD


@triton.jit
def _again(factors, tile, p, scale, RANK: tl.constexpr, GROUPS: tl.constexpr, STATISTIC: tl.constexpr):
    """The scaled statistic by differences or products of scaled factors: for few tiles, so its loop is not unrolled."""
    b_ptr, a_ptr, b_stride, a_stride, _ = factors
    rows, cols, row_mask, col_mask = tile
    COUNT: tl.constexpr = RANK // GROUPS
    acc = tl.zeros((row_mask & col_mask).shape, tl.float32)
    for k in tl.range(p * COUNT, p * COUNT + COUNT, num_stages=1):
        b = tl.load(b_ptr + rows + k * b_stride, row_mask, 0.0) * scale
        a = tl.load(a_ptr + cols + k * a_stride, col_mask, 0.0) * scale
        if STATISTIC == "dot":
            acc = tl.fma(tl.broadcast_to(b, acc.shape), tl.broadcast_to(a, acc.shape), acc)
        else:
            d = b - a
            acc = tl.fma(d, d, acc)
    return acc
