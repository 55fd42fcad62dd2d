"""The native CPU backend: C++ kernels behind :mod:`snell.native`."""

from __future__ import annotations

from torch import Tensor

from snell import memo, native
from snell.backends.layout import readable, row_major
from snell.spec import num_zeroed


def select_threshold(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> Tensor:
    A, B, theta = A.contiguous(), B.contiguous(), theta.contiguous()
    key = (native.fingerprint(A, B, theta), A.shape, B.shape, A.dtype, sparsity, kernel, groups)
    return memo.remember(
        key, lambda: native.select(A, B, theta, num_zeroed(sparsity, A.shape[0] * B.shape[0]), kernel, groups)
    )


def merge_out(
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor,
    weight: Tensor | None,
    out: Tensor,
    kernel: str,
    groups: int,
    gate: str,
) -> None:
    (A, B), (out, weight) = row_major((A, B), out, weight)
    native.merge(A.contiguous(), B.contiguous(), theta.contiguous(), tau, weight, out, kernel, groups, gate)


def factor_grad(
    G: Tensor,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor,
    weight: Tensor | None,
    merged: Tensor | None,
    grad_A: Tensor,
    grad_B: Tensor,
    grad_theta: Tensor,
    kernel: str,
    groups: int,
    gate: str,
) -> None:
    G = readable(G)
    lead = G if merged is None else merged
    (A, B, grad_A, grad_B), (_, G, weight, merged) = row_major((A, B, grad_A, grad_B), lead, G, weight, merged)
    native.factor_grad(
        G,
        A.contiguous(),
        B.contiguous(),
        theta.contiguous(),
        tau,
        weight,
        merged,
        grad_A,
        grad_B,
        grad_theta,
        kernel,
        groups,
        gate,
    )


#: Up to this share of survivors their products alone are cheaper than the GEMM for all of G, in float32. A bfloat16
#: GEMM is several times faster than that, and the products are not.
FEW_SURVIVORS = 1 / 8

#: Multiply-adds of a GEMM that are worth asking for the survivors' share, which takes some ten microseconds.
WORTH_ASKING = 2**26
SAMPLES = 4096

#: Tokens whose 256 columns of x, which a kernel visits in one sweep, stay in a second-level cache of 1 MiB; and bytes
#: that the transposed activations of a slab of tokens may take.
SLAB_TOKENS = 512
SLAB_BYTES = 16 * 2**20


def num_slabs(tokens: int, m: int, n: int, element_size: int) -> int:
    """In how many sweeps over the entries :func:`factor_grad_of_tokens` takes the tokens."""
    return -(-tokens // max(min(SLAB_TOKENS, SLAB_BYTES // ((m + n) * element_size)), 1))


def factor_grad_of_tokens(
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    grad_theta: Tensor,
    kernel: str,
    groups: int,
    gate: str,
) -> bool:
    """Add the gradients straight from ``grad_y [T, m]`` and ``x [T, n]``, if so few entries survive that it pays.

    Returns:
        Whether it did. Where not, the caller forms G and calls :func:`factor_grad`.
    """
    (tokens, m), n = grad_y.shape, x.shape[1]
    if gate == "none" or tokens * m * n < WORTH_ASKING or grad_y.dtype != A.dtype:
        return False
    A, B, theta = A.contiguous(), B.contiguous(), theta.contiguous()
    if native.density(A, B, theta, tau, kernel, groups, gate, SAMPLES) > FEW_SURVIVORS:
        return False
    slabs = num_slabs(tokens, m, n, A.element_size())
    # The gradients are linear in G, and G is a sum over tokens: a slab at a time bounds the transposed copies.
    for dy, some_x in zip(grad_y.tensor_split(slabs), x.tensor_split(slabs), strict=True):
        dy, some_x = dy.t().contiguous(), some_x.t().contiguous()
        native.factor_grad_of_tokens(dy, some_x, A, B, theta, tau, grad_A, grad_B, grad_theta, kernel, groups, gate)
    return True
