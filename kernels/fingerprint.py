"""A 64-bit hash of a layer's parameters: what tells whether a threshold is still theirs.

A sum of mixed (position, bits) pairs: integers, so any order of summation gives the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell.kernels import launch

BLOCK = 256


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
):
    """tau, or NaN where the hash of A, B and theta is another; a program owns BLOCK rows of A over B.

    ``state``: two zeros, the sum of the programs' hashes and how many have arrived.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.uint64)
    for k in range(RANK):
        a = tl.load(a_ptr + i * a_row_stride + k * a_col_stride, i < n, 0.0)
        b = tl.load(b_ptr + (i - n) * b_row_stride + k * b_col_stride, (i >= n) & (i < length), 0.0)
        total += hash_bits(tl.where(i < n, a, b), i * RANK + k, i < length)
    if NUM_THETA > 0:
        mask = i < NUM_THETA
        total += hash_bits(tl.load(theta_ptr + i, mask, 0.0), -1 - i, mask)
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
        triton.cdiv(length, BLOCK),
        (A, B, theta, tau, fingerprint, state, out, *A.stride(), *B.stride(), n, length),
        NUM_THETA=theta.numel(),
        RANK=A.shape[1],
        BLOCK=BLOCK,
    )
    return out
