"""A pass of select over K: count keys against the bracket, then choose tau or the next bracket."""

from __future__ import annotations

import triton
import triton.language as tl

from snell.kernels.merge import tile_indices
from snell.kernels.select import (
    ARRIVED,
    AT_HI,
    AT_LO,
    BELOW,
    HEAD,
    HI,
    LARGEST,
    LO,
    MISSES,
    SHIFT,
    fresh,
    halves_of_program,
    keys,
    kth_smallest,
    layer_of_program,
    set_bracket,
    settle,
)
from snell.kernels.shares import is_last

#: Bins that the deciding program reads at a time.
_CHUNK = tl.constexpr(1024)


@triton.jit
def _count(
    factors_ptr,
    halves,
    theta_ptr,
    max_ptr,
    state_ptr,
    bucket_ptr,
    stride,
    m,
    n,
    bucket,
    start,
    step,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Count the keys of every ``step``-th tile into the layer's state and buckets."""
    lo, hi = fresh(state_ptr + LO).to(tl.int32), fresh(state_ptr + HI).to(tl.int32)
    shift = fresh(state_ptr + SHIFT).to(tl.int32)
    below = tl.zeros([BLOCK_N], tl.int32)
    at_lo = tl.zeros([BLOCK_N], tl.int32)
    at_hi = tl.zeros([BLOCK_N], tl.int32)
    for tile in tl.range(start, tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N), step, disable_licm=True):
        indices = tile_indices(tile, m, n, BLOCK_M, BLOCK_N)
        key = keys(factors_ptr, halves, theta_ptr, max_ptr, stride, n, indices, RANK, GROUPS, STATISTIC, KERNEL)
        mask = indices[2] & indices[3]
        below += tl.sum((mask & (key < lo)).to(tl.int32), 0)
        at_lo += tl.sum((mask & (key == lo)).to(tl.int32), 0)
        at_hi += tl.sum((mask & (key == hi) & (lo < hi)).to(tl.int32), 0)
        # The ends are counted apart: many equal keys (K = 0, say) would queue for one bin.
        inside = mask & (key > lo) & (key < hi)
        bin = (key - lo - 1) >> shift
        one = tl.full(key.shape, 1, tl.int64)
        slot = tl.minimum(tl.atomic_add(state_ptr + HEAD + bin, one, inside, sem="relaxed"), bucket).to(tl.int32)
        tl.store(bucket_ptr + bin * bucket + slot, key, inside & (slot < bucket))
    tl.atomic_add(state_ptr + BELOW, tl.sum(below.to(tl.int64)), sem="relaxed")
    tl.atomic_add(state_ptr + AT_LO, tl.sum(at_lo.to(tl.int64)), sem="relaxed")
    tl.atomic_add(state_ptr + AT_HI, tl.sum(at_hi.to(tl.int64)), sem="relaxed")


@triton.jit
def _choose(
    state_ptr, memo_ptr, bucket_ptr, tau_ptr, k, bucket, salt,
    HAS_MEMO: tl.constexpr, BINS: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    """What a pass's counts say: tau, or another bracket. Everything is read before anything is written."""
    k = tl.full([], 0, tl.int64) + k
    lo, hi, shift = fresh(state_ptr + LO), fresh(state_ptr + HI), fresh(state_ptr + SHIFT)
    below, at_lo, at_hi = fresh(state_ptr + BELOW), fresh(state_ptr + AT_LO), fresh(state_ptr + AT_HI)
    misses = fresh(state_ptr + MISSES)
    start = below + at_lo
    stop, before, bin = start, start, tl.full([], 0, tl.int64)
    for first in range(0, BINS, _CHUNK):
        counts = fresh(state_ptr + HEAD + first + tl.arange(0, _CHUNK))
        ends = stop + tl.cumsum(counts, 0)
        bin += tl.sum((ends < k).to(tl.int64))
        before = tl.maximum(before, tl.max(tl.where(ends < k, ends, 0)))
        stop += tl.sum(counts)
    key = tl.full([], -1, tl.int64)
    # A bracket that missed grows by four times its width; where that misses too, by all there is.
    reach = tl.where(misses == 0, 4 * (hi - lo) + BINS, LARGEST)
    new_lo, new_hi = hi + 1, tl.minimum(hi + reach, LARGEST)
    missed = tl.full([], 1, tl.int64)
    if k <= below:
        new_lo, new_hi = tl.maximum(lo - reach, 0), lo - 1
    elif k <= start:
        key = lo
    elif k <= stop:
        missed = tl.full([], 0, tl.int64)
        count = fresh(state_ptr + HEAD + bin)
        new_lo = lo + 1 + (bin << shift)
        new_hi = tl.minimum(new_lo + (tl.full([], 1, tl.int64) << shift), hi) - 1
        if shift == 0:
            key = new_lo
        elif count <= bucket:
            j = tl.arange(0, BUCKET)
            kept = tl.load(bucket_ptr + bin * bucket + j, j < count, LARGEST, cache_modifier=".cg")
            key = kth_smallest(kept, k - before).to(tl.int64)
    elif k <= stop + at_hi:
        key = hi
    tl.debug_barrier()
    if key >= 0:
        settle(state_ptr, memo_ptr, tau_ptr, salt, key, HAS_MEMO)
    else:
        set_bracket(state_ptr, new_lo, new_hi, BINS)
    # For the next pass.
    tl.store(state_ptr + MISSES, misses + missed)
    for first in range(0, BINS, _CHUNK):
        tl.store(state_ptr + HEAD + first + tl.arange(0, _CHUNK), tl.zeros([_CHUNK], tl.int64))
    for counter in tl.static_range(BELOW, AT_HI + 1):
        tl.store(state_ptr + counter, tl.full([], 0, tl.int64))
    tl.store(state_ptr + ARRIVED, tl.full([], 0, tl.int64))
    # The next pass may be this program's own.
    tl.debug_barrier()


@triton.jit(do_not_specialize=["k", "bucket", "salt", "goes_on"])
def count_kernel(
    factors_ptr,
    halves,
    theta_ptr,
    max_ptr,
    state_ptr,
    memo_ptr,
    bucket_ptr,
    tau_ptr,
    stride,
    m,
    n,
    k,
    bucket,
    salt,
    goes_on,
    HAS_MEMO: tl.constexpr,
    NUM_THETA: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    BINS: tl.constexpr,
    BUCKET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One pass over K; a program owns every num_programs(0)-th tile. The last to arrive decides, and ``goes_on``."""
    factors_ptr, theta_ptr, state_ptr = layer_of_program(factors_ptr, theta_ptr, state_ptr, m, n, NUM_THETA, BINS)
    bucket_ptr += tl.program_id(1).to(tl.int64) * BINS * bucket
    tau_ptr += tl.program_id(1)
    if halves is not None:
        halves = halves_of_program(halves, m, n, RANK, GROUPS)
    start, step = tl.program_id(0), tl.num_programs(0)
    shift = fresh(state_ptr + SHIFT)
    while shift >= 0:
        _count(
            factors_ptr, halves, theta_ptr, max_ptr, state_ptr, bucket_ptr, stride, m, n, bucket, start, step, RANK,
            GROUPS, STATISTIC, KERNEL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        shift = tl.full([], -1, tl.int64)
        if is_last(state_ptr + ARRIVED, step):
            _choose(state_ptr, memo_ptr, bucket_ptr, tau_ptr, k, bucket, salt, HAS_MEMO, BINS, BUCKET)
            if goes_on:
                start, step = start * 0, step * 0 + 1
                shift = fresh(state_ptr + SHIFT)
