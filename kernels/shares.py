"""Sums that several programs hold shares of, added in one fixed order whoever adds them."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from snell.kernels import launch

#: Outputs of one program, and shares it adds at a time.
OUTPUTS, SHARES = 64, 32


@triton.jit
def is_last(arrived_ptr, programs):
    """Whether all ``programs`` have arrived; what they wrote before is then visible."""
    # Every thread has written before one of them says so.
    tl.debug_barrier()
    return tl.atomic_add(arrived_ptr, tl.full([], 1, tl.int64)) == programs - 1


@triton.jit
def add_shares(
    share_ptr, grad_ptr, first, stop, size, shares, OUTPUTS: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    """grad += its shares ``[shares, size]``, for the numbers from ``first`` to before ``stop``."""
    for start in range(first, stop, OUTPUTS):
        i = start + tl.arange(0, OUTPUTS).to(tl.int64)
        total = tl.zeros([SHARES, OUTPUTS], tl.float32)
        for block in range(0, shares, SHARES):
            s = block + tl.arange(0, SHARES)
            mask = (s < shares)[:, None] & (i < stop)[None, :]
            ptr = share_ptr + s.to(tl.int64)[:, None] * size + i[None, :]
            total += tl.load(ptr, mask, 0.0, cache_modifier=".cg")
        grad = tl.load(grad_ptr + i, i < stop)
        tl.store(grad_ptr + i, grad + tl.sum(total, 0), i < stop)


@triton.jit
def add_shares_kernel(
    share_a_ptr,
    share_b_ptr,
    share_theta_ptr,
    grad_a_ptr,
    grad_b_ptr,
    grad_theta_ptr,
    size_a,
    size_b,
    size_theta,
    shares_a,
    shares_b,
    shares_theta,
    OUTPUTS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """A program owns OUTPUTS numbers of one gradient."""
    program = tl.program_id(0)
    programs_a, programs_b = tl.cdiv(size_a, OUTPUTS), tl.cdiv(size_b, OUTPUTS)
    if program < programs_a:
        first = program * OUTPUTS
        add_shares(
            share_a_ptr, grad_a_ptr, first, tl.minimum(first + OUTPUTS, size_a), size_a, shares_a, OUTPUTS, SHARES
        )  # fmt: skip
    elif program < programs_a + programs_b:
        first = (program - programs_a) * OUTPUTS
        add_shares(
            share_b_ptr, grad_b_ptr, first, tl.minimum(first + OUTPUTS, size_b), size_b, shares_b, OUTPUTS, SHARES
        )  # fmt: skip
    else:
        add_shares(share_theta_ptr, grad_theta_ptr, 0, size_theta, size_theta, shares_theta, OUTPUTS, SHARES)


def add_all_shares(shares: Sequence[Tensor], grads: Sequence[Tensor], down: int, across: int) -> None:
    """Add the shares of ``down`` strips of rows and ``across`` of columns to the gradients of A, B and theta.

    Gradients without shares are left alone.
    """
    sizes = [grad.numel() if share.numel() else 0 for share, grad in zip(shares, grads, strict=True)]
    launch.run(
        add_shares_kernel,
        -(-sizes[0] // OUTPUTS) + -(-sizes[1] // OUTPUTS) + (sizes[2] > 0),
        (*shares, *grads, *sizes, down, across, down * across),
        OUTPUTS=OUTPUTS,
        SHARES=SHARES,
    )
