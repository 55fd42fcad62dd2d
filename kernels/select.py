"""tau, the k-th smallest |K| of each layer, exact, without the matrix and without asking the host.

The bits of a non-negative float order as the float does, so an entry's key is the integer ``bits(|K|)`` and tau is the
k-th smallest key (NaN sorts largest). A call serves layers of one shape and sparsity, whose factors lie side by side;
all that the host knows of them are scalar arguments, so no table has to reach the device. A call is always the same
launches; in each, the program that arrives last settles what follows from the others' work:

    bracket_kernel  a 64-bit hash of the factors, and keys of entries drawn at random. Then: where the hash is the one
                    tau was last selected for, tau; else two order statistics of the sample, 4 standard deviations to
                    either side of the k-th
    count_kernel    PASSES times; returns at once when tau is known. Recompute K, count keys below, at and above the
                    bracket, and sort those inside into BINS bins, each with a bucket that keeps the first few keys.
                    Then: tau from the bucket that holds the k-th, or a narrower bracket

So the matrix is computed once, as a rule. The second pass serves a bracket that missed (1 call in 16000) and a bucket
that ran over (always beyond some 5e8 entries). What is still open after it takes a coincidence of both; the program
that arrived last then goes on alone until tau is found, slowly. All counters are 64 bits wide.

Why a fingerprint and no version counter: sharded parameters are gathered into the same storage, ``.data`` is edited,
graphs are replayed; what the factors hold misses none of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snell.kernels.fingerprint import hash_columns, hash_theta
from snell.kernels.halves import width
from snell.kernels.kappa import kernel_value, pair_statistics
from snell.kernels.shares import is_last

#: A key no |K| exceeds.
LARGEST = tl.constexpr(0x7FFFFFFF)

#: Head of a layer's state, in int64, before its bins: the bracket (inclusive), log2 of the keys in a bin or -1 once
#: tau is known, the three counts of a pass, the factors' hash, programs arrived, brackets that missed.
LO, HI, SHIFT, BELOW, AT_LO, AT_HI, HASH, ARRIVED, MISSES = (tl.constexpr(i) for i in range(9))
HEAD = tl.constexpr(16)


@triton.jit
def layer_of_program(factors_ptr, theta_ptr, state_ptr, m, n, NUM_THETA: tl.constexpr, BINS: tl.constexpr):
    """This program's layer: its factors, theta and state."""
    layer = tl.program_id(1).to(tl.int64)
    return factors_ptr + layer * (m + n), theta_ptr + layer * NUM_THETA, state_ptr + layer * (HEAD + BINS)


@triton.jit
def halves_of_program(halves, m, n, RANK: tl.constexpr, GROUPS: tl.constexpr):
    """The halves of this program's layer: B's and A's parts and their scale."""
    parts_ptr, scale_ptr = halves
    layer = tl.program_id(1).to(tl.int64)
    parts_ptr += layer * (m + n) * width(RANK, GROUPS)
    return parts_ptr + n.to(tl.int64) * width(RANK, GROUPS), parts_ptr, scale_ptr + 2 * layer


@triton.jit
def keys(
    factors_ptr,
    halves,
    theta_ptr,
    max_ptr,
    stride,
    n,
    tile,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
):
    factors = factors_ptr + n, factors_ptr, stride, stride, halves
    statistics = pair_statistics(factors, tile, RANK, GROUPS, STATISTIC)
    K = kernel_value(statistics, theta_ptr, max_ptr, tile, GROUPS, KERNEL)
    return K.to(tl.int32, bitcast=True) & LARGEST


@triton.jit
def fresh(ptr):
    """A number that other programs wrote: not from this multiprocessor's own cache."""
    return tl.load(ptr, cache_modifier=".cg")


@triton.jit
def kth_smallest(keys, k):
    """The k-th smallest of non-negative int32 ``keys``, bit by bit."""
    answer = tl.full([], 0, tl.int32)
    for i in range(31):
        candidate = answer | (1 << (30 - i))
        answer = tl.where(tl.sum((keys < candidate).to(tl.int32)) < k, candidate, answer)
    return answer


@triton.jit
def set_bracket(state_ptr, lo, hi, BINS: tl.constexpr):
    """A new bracket, with the least shift whose BINS bins cover the keys strictly inside it."""
    last = tl.maximum(hi - lo - 2, 0)
    shift = tl.sum(((last >> tl.arange(0, 32).to(tl.int64)) >= BINS).to(tl.int64))
    tl.store(state_ptr + LO, lo)
    tl.store(state_ptr + HI, hi)
    tl.store(state_ptr + SHIFT, shift)


@triton.jit
def fingerprint(state_ptr, salt):
    # Never 0: that is a fresh memo's.
    return (fresh(state_ptr + HASH) + salt) | 1


@triton.jit
def settle(state_ptr, memo_ptr, tau_ptr, salt, key, HAS_MEMO: tl.constexpr):
    """tau is known: hand it out and remember it with the fingerprint it belongs to."""
    tl.store(tau_ptr, key.to(tl.int32).to(tl.float32, bitcast=True))
    if HAS_MEMO:
        of_factors = fingerprint(state_ptr, salt)
        tl.store(memo_ptr, of_factors)
        tl.store(memo_ptr + 1, (of_factors << 32) | key)
    tl.store(state_ptr + SHIFT, tl.full([], -1, tl.int64))


@triton.jit(do_not_specialize=["samples", "low", "high", "salt"])
def bracket_kernel(
    factors_ptr,
    theta_ptr,
    max_ptr,
    state_ptr,
    memo_ptr,
    sample_ptr,
    tau_ptr,
    stride,
    m,
    n,
    samples,
    low,
    high,
    salt,
    HAS_MEMO: tl.constexpr,
    NUM_THETA: tl.constexpr,
    SAMPLES: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    STATISTIC: tl.constexpr,
    KERNEL: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """tau where it is known, else the first bracket.

    A program owns BLOCK samples and, of the factors, COLUMNS rank columns of BLOCK rows; either may be none.
    """
    factors_ptr, theta_ptr, state_ptr = layer_of_program(factors_ptr, theta_ptr, state_ptr, m, n, NUM_THETA, BINS)
    sample_ptr += tl.program_id(1).to(tl.int64) * SAMPLES
    program, length = tl.program_id(0), m + n
    across = tl.cdiv(length, BLOCK)
    if program < across * tl.cdiv(RANK, COLUMNS):
        i = (program % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        first = program // across * COLUMNS
        total = hash_columns(factors_ptr + i, stride, i, i < length, first, RANK, COLUMNS)
        total += hash_theta(theta_ptr, tl.arange(0, BLOCK), program == 0, NUM_THETA)
        tl.atomic_add(state_ptr + HASH, tl.sum(total).to(tl.int64), sem="relaxed")
    i = program * BLOCK + tl.arange(0, BLOCK)
    if program * BLOCK < samples:
        draw_row, draw_col, _, _ = tl.randint4x(0, i)
        rows = draw_row.to(tl.uint32, bitcast=True).to(tl.int64) % m
        cols = draw_col.to(tl.uint32, bitcast=True).to(tl.int64) % n
        mask = i < samples
        tile = rows, cols, mask, mask
        drawn = keys(factors_ptr, None, theta_ptr, max_ptr, stride, n, tile, RANK, GROUPS, STATISTIC, KERNEL)
        tl.store(sample_ptr + i, drawn, mask)
    if is_last(state_ptr + ARRIVED, tl.num_programs(0)):
        known = tl.full([], 0, tl.int1)
        if HAS_MEMO:
            # Two streams may select for one layer at a time: the second half of the fingerprint tells a tau that does
            # not belong to the first.
            found, held = fingerprint(state_ptr, salt), fresh(memo_ptr + 1)
            known = (found == fresh(memo_ptr)) & ((found ^ (held >> 32)).to(tl.int32) == 0)
            if known:
                tl.store(tau_ptr + tl.program_id(1), held.to(tl.int32).to(tl.float32, bitcast=True))
                tl.store(state_ptr + SHIFT, tl.full([], -1, tl.int64))
        if not known:
            j = tl.arange(0, SAMPLES)
            drawn = tl.load(sample_ptr + j, j < samples, LARGEST, cache_modifier=".cg")
            lo = tl.where(low < 1, 0, kth_smallest(drawn, low)).to(tl.int64)
            hi = tl.where(high > samples, LARGEST, kth_smallest(drawn, high)).to(tl.int64)
            set_bracket(state_ptr, lo, hi, BINS)
        tl.store(state_ptr + ARRIVED, tl.full([], 0, tl.int64))
