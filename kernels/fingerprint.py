"""A 64-bit hash of a layer's parameters: what tells whether a threshold is still theirs.

A sum of mixed (position, bits) pairs: integers, so any order of summation gives the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell.kernels import launch

#: Rows and rank columns whose numbers one program of verify has in flight at a time.
BLOCK, COLUMNS = 256, 8


@triton.jit
def _mix(x):
    """splitmix64's finaliser."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def hash_bits(x, position, mask):
    bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)
    return tl.where(mask, _mix((position.to(tl.uint64) << 32) ^ bits), 0)


@triton.jit
def hash_columns(ptr, stride, i, mask, first, RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """The hashes of rows ``i``, whose first numbers lie at ``ptr``, over COLUMNS rank columns from ``first``."""
    total = tl.zeros(i.shape, tl.uint64)
    for j in tl.static_range(COLUMNS):
        k = tl.zeros_like(i) + (first + j)
        inside = mask & (k < RANK)
        total += hash_bits(tl.load(ptr + k * stride, inside, 0.0), i * RANK + k, inside)
    return total


@triton.jit
def hash_theta(theta_ptr, i, mine, NUM_THETA: tl.constexpr):
    """The hashes of theta, where they are this program's: counted from -1 downwards, apart from the factors."""
    total = tl.zeros(i.shape, tl.uint64)
    if NUM_THETA > 0:
        mask = i < tl.where(mine, NUM_THETA, 0)
        total += hash_bits(tl.load(theta_ptr + i, mask, 0.0), -1 - i.to(tl.int64), mask)
    return total


@triton.jit
def verify_kernel(
    a_ptr,
    b_ptr,
    theta_ptr,
    tau_ptr,
    hash_ptr,
    state_ptr,
    out_ptr,
    a_row_stride,
    a_col_stride,
    b_row_stride,
    b_col_stride,
    n,
    length,
    NUM_THETA: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """tau, or NaN where the hash of A, B and theta is another; a program owns COLUMNS columns of BLOCK rows.

    ``state``: two zeros, the sum of the programs' hashes and how many have arrived.
    """
    across = tl.cdiv(length, BLOCK)
    i = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) // across * COLUMNS
    total = hash_columns(a_ptr + i * a_row_stride, a_col_stride, i, i < n, first, RANK, COLUMNS)
    b_ptr += (i - n) * b_row_stride
    total += hash_columns(b_ptr, b_col_stride, i, (i >= n) & (i < length), first, RANK, COLUMNS)
    total += hash_theta(theta_ptr, tl.arange(0, BLOCK), tl.program_id(0) == 0, NUM_THETA)
    tl.atomic_add(state_ptr, tl.sum(total).to(tl.int64))
    # The last program to arrive sees every sum.
    arrived = tl.atomic_add(state_ptr + 1, tl.full([], 1, tl.int64))
    if arrived == tl.num_programs(0) - 1:
        found = tl.atomic_add(state_ptr, tl.full([], 0, tl.int64))
        stale = found != tl.load(hash_ptr)
        tl.store(out_ptr, tl.where(stale, float("nan"), tl.load(tau_ptr)))


def verify(A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, fingerprint: Tensor) -> Tensor:
    """tau ``[]`` if the parameters still have the fingerprint ``[]`` (int64) of when it was selected, else NaN."""
    n, length = A.shape[0], A.shape[0] + B.shape[0]
    state = torch.zeros(2, dtype=torch.int64, device=A.device)
    out = torch.empty_like(tau)
    launch.run(
        verify_kernel,
        triton.cdiv(length, BLOCK) * triton.cdiv(A.shape[1], COLUMNS),
        (A, B, theta, tau, fingerprint, state, out, *A.stride(), *B.stride(), n, length),
        NUM_THETA=theta.numel(),
        RANK=A.shape[1],
        BLOCK=BLOCK,
        COLUMNS=COLUMNS,
    )
    return out
