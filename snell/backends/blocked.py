"""Plain PyTorch in blocks, for any device: what runs where no faster backend does.

The arithmetic of K is the reference's own, a tile at a time, so that nothing of size m*n is held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from snell import memo, radix
from snell.reference import gate_values, kernel_matrix
from snell.spec import KERNEL_FUNCTIONS, num_zeroed

#: Entries of K in a tile times its rank: bounds the products that the reference's dot holds.
TILE_PRODUCTS = 2**21


def _tiles(m: int, n: int, rank: int) -> Iterator[tuple[slice, slice]]:
    cols = min(n, 512)
    rows = max(1, TILE_PRODUCTS // (cols * rank))
    for i in range(0, m, rows):
        for j in range(0, n, cols):
            yield slice(i, min(i + rows, m)), slice(j, min(j + cols, n))


def _select(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> Tensor:
    n, m, rank = A.shape[0], B.shape[0], A.shape[1]

    def tiles() -> Iterator[Tensor]:
        return (kernel_matrix(A[j], B[i], theta, kernel=kernel, groups=groups) for i, j in _tiles(m, n, rank))

    return radix.smallest(num_zeroed(sparsity, m * n), tiles, A)


@torch.no_grad()
def select_threshold(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> Tensor:
    if A.device.type != "cpu":
        return _select(A, B, theta, sparsity, kernel, groups)
    key = (memo.fingerprint(A, B, theta), A.shape, B.shape, A.dtype, sparsity, kernel, groups)
    return memo.remember(key, lambda: _select(A, B, theta, sparsity, kernel, groups))


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
    for i, j in _tiles(B.shape[0], *A.shape):
        K = kernel_matrix(A[j], B[i], theta, kernel=kernel, groups=groups)
        gates = gate_values(K, tau, gate=gate)
        _write(out[i, j], None if weight is None else weight[i, j], K * gates)


def _write(out: Tensor, weight: Tensor | None, delta: Tensor) -> None:
    # Where dW is 0 the base weight passes through untouched: adding +0 would turn -0 into +0.
    # Chosen in out's dtype: by way of another, the bits of a NaN would not come back.
    out.copy_(
        delta if weight is None else torch.where(delta == 0, weight.to(out.dtype), (weight + delta).to(out.dtype))
    )


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
    for i, j in _tiles(B.shape[0], *A.shape):
        K = kernel_matrix(A[j], B[i], theta, kernel=kernel, groups=groups)
        gates = gate_values(K, tau, gate=gate)
        H = torch.where(gates == 0, 0, G[i, j].to(K.dtype) * gates)
        if merged is not None:
            _write(merged[i, j], None if weight is None else weight[i, j], K * gates)
        with torch.autocast(A.device.type, enabled=False):  # which would round the products to half precision
            _accumulate(H, A[j], B[i], theta, grad_A[j], grad_B[i], grad_theta, kernel, groups)


def _accumulate(
    H: Tensor,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    grad_theta: Tensor,
    kernel: str,
    groups: int,
) -> None:
    """Add sum H * dkappa to the three gradients, in place."""
    per_group = groups if KERNEL_FUNCTIONS[kernel].grouped else 1
    for p, (a, b, ga, gb) in enumerate(zip(*(t.chunk(per_group, 1) for t in (A, B, grad_A, grad_B)), strict=True)):
        if kernel == "piecewise_linear":
            norm = kernel_matrix(a, b, theta.new_ones(1), kernel=kernel, groups=1)
            grad_theta[p] += (H * norm).sum()
            _pull(torch.where(norm == 0, 0, theta[p] * H / norm), a, b, ga, gb)
        elif kernel == "linear":
            gb += H @ a
            ga += H.T @ b
        else:
            alpha, beta, _ = theta
            unit_theta = torch.stack((torch.ones_like(beta), beta, torch.zeros_like(beta)))
            unit = kernel_matrix(a, b, unit_theta, kernel=kernel, groups=1)
            grad_theta[0] += (H * unit).sum()
            grad_theta[2] += H.sum()
            if kernel == "sigmoid":
                slope = H * alpha * unit * (1 - unit)
                dot = kernel_matrix(a, b, theta[:0], kernel="linear", groups=1)
                grad_theta[1] += (slope * dot).sum()
                gb += beta * (slope @ a)
                ga += beta * (slope.T @ b)
            else:
                slope = -H * alpha * unit
                norm = kernel_matrix(a, b, theta.new_ones(1), kernel="piecewise_linear", groups=1)
                grad_theta[1] += (slope * norm.square()).sum()
                _pull(2 * beta * slope, a, b, ga, gb)


def _pull(C: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> None:
    """sum_j C_ij (b_i - a_j) into grad_b, its negative over i into grad_a."""
    grad_b += C.sum(1, keepdim=True) * b - C @ a
    grad_a += C.sum(0).unsqueeze(1) * a - C.T @ b
