"""tau, the k-th smallest |K| of each layer, exact, without the matrix and without asking the host.

The bits of a non-negative float order as the float does, so an entry's key is the integer ``bits(|K|)``
and tau is the k-th smallest key (NaN sorts largest). Every launch serves all layers of a call, whatever
their shapes; a layer is a row of a small table on the device. One call is always the same launches:

    fingerprint   a 64-bit hash of the packed factors; where it is the one tau was last selected for, every
                  later launch returns at once (gradient accumulation, evaluation, checkpointing)
    sample        keys of entries drawn at random
    bracket       two order statistics of the sample, 4 standard deviations to either side of the k-th
    count, choose PASSES times, until tau is found: recompute K, count keys below, at and above the bracket,
                  and sort those inside into BINS bins, each with a bucket that keeps the first few keys;
                  then narrow the bracket to the bin that holds the k-th, whose bucket settles tau at once

So the matrix is computed once, as a rule. If the bracket missed (1 call in 16000) or a bucket ran over
(beyond some 5e8 entries), the next pass works on a narrower bracket: of all 2^31 keys each pass leaves an
8192nd, so three passes after a miss end with one key. All counters are 64 bits wide.

The host knows sizes only. Why a fingerprint and no version counter: sharded parameters are gathered into
the same storage, ``.data`` is edited, graphs are replayed; what the factors hold misses none of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snell.kernels.fingerprint import hash_bits
from snell.kernels.kappa import kernel_value, pair_statistics
from snell.kernels.merge import tile_indices

#: A key no |K| exceeds.
_LARGEST = tl.constexpr(0x7FFFFFFF)

#: A layer's row of the table, in int64: where its factors stand in the packed ones, sizes, the rank of tau,
#: how many entries are sampled and which order statistics of them bracket tau (outside 1..samples: none),
#: the keys a bucket holds and where the buckets begin, the slot that remembers its tau, and what the
#: fingerprint starts from.
FIELDS = ("a", "b", "theta", "m", "n", "k", "samples", "low", "high", "bucket", "buckets", "memo", "salt")
_A, _B, _THETA, _M, _N, _K = (tl.constexpr(i) for i in range(6))
_SAMPLES, _LOW, _HIGH, _BUCKET, _BUCKETS, _MEMO, _SALT = (tl.constexpr(i) for i in range(6, 13))
_FIELDS = tl.constexpr(len(FIELDS))

#: Head of a layer's state, in int64, before its bins: the bracket (inclusive), log2 of the keys in a bin or
#: -1 once tau is known, the three counts of a pass, and the factors' hash.
HEAD, HASH = 8, 6
_LO, _HI, _SHIFT, _BELOW, _AT_LO, _AT_HI = (tl.constexpr(i) for i in range(6))
_HASH = tl.constexpr(HASH)
_HEAD = tl.constexpr(HEAD)


@triton.jit
def _layer(table_ptr, state_ptr, memo_ptr, layer, BINS: tl.constexpr):
    """Pointers to a layer's row, state and memo: its fingerprint, and half of that again above tau's bits."""
    row_ptr = table_ptr + layer * _FIELDS
    return row_ptr, state_ptr + layer * (_HEAD + BINS), memo_ptr + 2 * tl.load(row_ptr + _MEMO)


@triton.jit
def _keys(
    factors,
    theta_ptr,
    row_ptr,
    tile,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
):
    factors_ptr, stride = factors
    factors = factors_ptr + tl.load(row_ptr + _B), factors_ptr + tl.load(row_ptr + _A), stride, stride
    statistics = pair_statistics(factors, tile, RANK, GROUPS, STATISTIC)
    K = kernel_value(statistics, theta_ptr + tl.load(row_ptr + _THETA), KERNEL)
    return K.to(tl.int32, bitcast=True) & _LARGEST


@triton.jit
def _kth_smallest(keys, k):
    """The k-th smallest of non-negative int32 ``keys``, bit by bit."""
    answer = tl.full([], 0, tl.int32)
    for i in range(31):
        candidate = answer | (1 << (30 - i))
        answer = tl.where(tl.sum((keys < candidate).to(tl.int32)) < k, candidate, answer)
    return answer


@triton.jit
def _set_bracket(state_ptr, lo, hi, BINS: tl.constexpr):
    """A new bracket, with the least shift whose BINS bins cover the keys strictly inside it."""
    last = tl.maximum(hi - lo - 2, 0)
    shift = tl.sum(((last >> tl.arange(0, 32).to(tl.int64)) >= BINS).to(tl.int64))
    tl.store(state_ptr + _LO, lo)
    tl.store(state_ptr + _HI, hi)
    tl.store(state_ptr + _SHIFT, shift)


@triton.jit
def fingerprint_kernel(
    factors_ptr,
    theta_ptr,
    table_ptr,
    state_ptr,
    memo_ptr,
    stride,
    NUM_THETA: tl.constexpr,
    RANK: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Hash of A, B and theta: a sum of mixed (position, bits); integers, so any order gives the same."""
    row_ptr, state_ptr, _ = _layer(table_ptr, state_ptr, memo_ptr, tl.program_id(1), BINS)
    # A layer's A and B are neighbours in the packed factors.
    length = tl.load(row_ptr + _M) + tl.load(row_ptr + _N)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0).to(tl.int64) * BLOCK < length:
        total = tl.zeros([BLOCK], tl.uint64)
        for k in range(RANK):
            x = tl.load(factors_ptr + tl.load(row_ptr + _A) + k * stride + i, i < length, 0.0)
            total += hash_bits(x, i * RANK + k, i < length)
        if NUM_THETA > 0:
            mask = i < NUM_THETA
            total += hash_bits(tl.load(theta_ptr + tl.load(row_ptr + _THETA) + i, mask, 0.0), -1 - i, mask)
        tl.atomic_add(state_ptr + _HASH, tl.sum(total).to(tl.int64), sem="relaxed")


@triton.jit
def _fingerprint(row_ptr, state_ptr):
    # Never 0: that is a fresh memo's.
    return (tl.load(state_ptr + _HASH) + tl.load(row_ptr + _SALT)) | 1


@triton.jit
def _is_known(row_ptr, state_ptr, memo_ptr):
    """Whether tau was last selected for these very factors. Two streams may select for one layer at a time: the
    second half of the fingerprint tells a tau that does not belong to the first."""
    fingerprint = _fingerprint(row_ptr, state_ptr)
    return (fingerprint == tl.load(memo_ptr)) & ((fingerprint ^ (tl.load(memo_ptr + 1) >> 32)).to(tl.int32) == 0)


@triton.jit
def sample_kernel(
    factors_ptr,
    theta_ptr,
    table_ptr,
    state_ptr,
    memo_ptr,
    sample_ptr,
    stride,
    SAMPLES: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys of entries drawn with replacement; a program owns BLOCK of them."""
    row_ptr, state_ptr, memo_ptr = _layer(table_ptr, state_ptr, memo_ptr, tl.program_id(1), BINS)
    samples = tl.load(row_ptr + _SAMPLES)
    if (tl.program_id(0) * BLOCK < samples) & (not _is_known(row_ptr, state_ptr, memo_ptr)):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        draw_row, draw_col, _, _ = tl.randint4x(0, i)
        rows = draw_row.to(tl.uint32, bitcast=True).to(tl.int64) % tl.load(row_ptr + _M)
        cols = draw_col.to(tl.uint32, bitcast=True).to(tl.int64) % tl.load(row_ptr + _N)
        mask = i < samples
        tile = rows, cols, mask, mask
        keys = _keys((factors_ptr, stride), theta_ptr, row_ptr, tile, RANK, GROUPS, STATISTIC, KERNEL)
        tl.store(sample_ptr + tl.program_id(1).to(tl.int64) * SAMPLES + i, keys, mask)


@triton.jit
def bracket_kernel(table_ptr, state_ptr, memo_ptr, sample_ptr, tau_ptr, SAMPLES: tl.constexpr, BINS: tl.constexpr):
    """The first bracket of a layer, or tau at once where it is known; a program owns a layer."""
    layer = tl.program_id(0)
    row_ptr, state_ptr, memo_ptr = _layer(table_ptr, state_ptr, memo_ptr, layer, BINS)
    if _is_known(row_ptr, state_ptr, memo_ptr):
        tl.store(tau_ptr + layer, tl.load(memo_ptr + 1).to(tl.int32).to(tl.float32, bitcast=True))
        tl.store(state_ptr + _SHIFT, tl.full([], -1, tl.int64))
    else:
        samples, low, high = tl.load(row_ptr + _SAMPLES), tl.load(row_ptr + _LOW), tl.load(row_ptr + _HIGH)
        i = tl.arange(0, SAMPLES)
        keys = tl.load(sample_ptr + layer.to(tl.int64) * SAMPLES + i, i < samples, _LARGEST)
        lo = tl.where(low < 1, 0, _kth_smallest(keys, low)).to(tl.int64)
        hi = tl.where(high > samples, _LARGEST, _kth_smallest(keys, high)).to(tl.int64)
        _set_bracket(state_ptr, lo, hi, BINS)


@triton.jit
def count_kernel(
    factors_ptr,
    theta_ptr,
    table_ptr,
    state_ptr,
    memo_ptr,
    bucket_ptr,
    stride,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One pass over K; a program owns every num_programs(0)-th tile of a layer."""
    row_ptr, state_ptr, _ = _layer(table_ptr, state_ptr, memo_ptr, tl.program_id(1), BINS)
    shift = tl.load(state_ptr + _SHIFT)
    if shift >= 0:
        m, n = tl.load(row_ptr + _M).to(tl.int32), tl.load(row_ptr + _N).to(tl.int32)
        lo, hi = tl.load(state_ptr + _LO).to(tl.int32), tl.load(state_ptr + _HI).to(tl.int32)
        size = tl.load(row_ptr + _BUCKET).to(tl.int32)
        bucket_ptr += tl.load(row_ptr + _BUCKETS)
        below = tl.zeros([BLOCK_N], tl.int32)
        at_lo = tl.zeros([BLOCK_N], tl.int32)
        at_hi = tl.zeros([BLOCK_N], tl.int32)
        for tile in range(tl.program_id(0), tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N), tl.num_programs(0)):
            indices = tile_indices(tile, m, n, BLOCK_M, BLOCK_N)
            key = _keys((factors_ptr, stride), theta_ptr, row_ptr, indices, RANK, GROUPS, STATISTIC, KERNEL)
            mask = indices[2] & indices[3]
            below += tl.sum((mask & (key < lo)).to(tl.int32), 0)
            at_lo += tl.sum((mask & (key == lo)).to(tl.int32), 0)
            at_hi += tl.sum((mask & (key == hi) & (lo < hi)).to(tl.int32), 0)
            # The ends are counted apart: many equal keys (K = 0, say) would queue for one bin.
            inside = mask & (key > lo) & (key < hi)
            bin = (key - lo - 1) >> shift.to(tl.int32)
            one = tl.full(key.shape, 1, tl.int64)
            slot = tl.minimum(tl.atomic_add(state_ptr + _HEAD + bin, one, inside, sem="relaxed"), size).to(tl.int32)
            tl.store(bucket_ptr + bin * size + slot, key, inside & (slot < size))
        tl.atomic_add(state_ptr + _BELOW, tl.sum(below.to(tl.int64)), sem="relaxed")
        tl.atomic_add(state_ptr + _AT_LO, tl.sum(at_lo.to(tl.int64)), sem="relaxed")
        tl.atomic_add(state_ptr + _AT_HI, tl.sum(at_hi.to(tl.int64)), sem="relaxed")


@triton.jit
def _settle(row_ptr, state_ptr, memo_ptr, tau_ptr, key):
    """tau is known: hand it out and remember it with the fingerprint it belongs to."""
    tl.store(tau_ptr, key.to(tl.int32).to(tl.float32, bitcast=True))
    fingerprint = _fingerprint(row_ptr, state_ptr)
    tl.store(memo_ptr, fingerprint)
    tl.store(memo_ptr + 1, (fingerprint << 32) | key.to(tl.int64))
    tl.store(state_ptr + _SHIFT, tl.full([], -1, tl.int64))


@triton.jit
def choose_kernel(table_ptr, state_ptr, memo_ptr, bucket_ptr, tau_ptr, BINS: tl.constexpr, BUCKET: tl.constexpr):
    """What a pass's counts say: tau, or a narrower bracket; a program owns a layer."""
    layer = tl.program_id(0)
    row_ptr, state_ptr, memo_ptr = _layer(table_ptr, state_ptr, memo_ptr, layer, BINS)
    shift = tl.load(state_ptr + _SHIFT)
    if shift >= 0:
        k, lo, hi = tl.load(row_ptr + _K), tl.load(state_ptr + _LO), tl.load(state_ptr + _HI)
        i = tl.arange(0, BINS)
        counts = tl.load(state_ptr + _HEAD + i)
        below = tl.load(state_ptr + _BELOW)
        start = below + tl.load(state_ptr + _AT_LO)
        stop = start + tl.sum(counts)
        if k <= below:
            _set_bracket(state_ptr, tl.zeros_like(lo), lo - 1, BINS)
        elif k <= start:
            _settle(row_ptr, state_ptr, memo_ptr, tau_ptr + layer, lo)
        elif k <= stop:
            ends = start + tl.cumsum(counts, 0)
            bin = tl.sum((ends < k).to(tl.int64))
            count = tl.sum(tl.where(i == bin, counts, 0))
            before = tl.sum(tl.where(i == bin, ends, 0)) - count
            first = lo + 1 + (bin << shift)
            size = tl.load(row_ptr + _BUCKET)
            if shift == 0:
                _settle(row_ptr, state_ptr, memo_ptr, tau_ptr + layer, first)
            elif count <= size:
                j = tl.arange(0, BUCKET)
                keys_ptr = bucket_ptr + tl.load(row_ptr + _BUCKETS) + bin * size
                keys = tl.load(keys_ptr + j, j < count, _LARGEST)
                _settle(row_ptr, state_ptr, memo_ptr, tau_ptr + layer, _kth_smallest(keys, k - before))
            else:
                _set_bracket(state_ptr, first, tl.minimum(first + (tl.full([], 1, tl.int64) << shift), hi) - 1, BINS)
        elif k <= stop + tl.load(state_ptr + _AT_HI):
            _settle(row_ptr, state_ptr, memo_ptr, tau_ptr + layer, hi)
        else:
            _set_bracket(state_ptr, hi + 1, tl.full([], 0, tl.int64) + _LARGEST, BINS)
        # For the next pass.
        tl.store(state_ptr + _HEAD + i, tl.zeros_like(counts))
        for counter in tl.static_range(_BELOW, _AT_HI + 1):
            tl.store(state_ptr + counter, tl.full([], 0, tl.int64))
