"""The native CPU backend: C++ kernels behind :mod:`snell.native`."""

from __future__ import annotations

from torch import Tensor

from snell import memo, native
from snell.backends.layout import row_major
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
