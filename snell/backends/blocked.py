"""Plain PyTorch in blocks, for any device: what runs where no faster backend does.

The arithmetic of K is the reference's own, a tile at a time, so that nothing of size m*n is held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from snell import memo
from snell.reference import gate_values, kernel_matrix
from snell.spec import KERNEL_FUNCTIONS, num_zeroed

#: Entries of K in a tile times its rank: bounds the products that the reference's dot holds.
TILE_PRODUCTS = 2**21

#: Bits of a float's magnitude settled by one pass of the radix select.
RADIX_BITS = 11


def _tiles(m: int, n: int, rank: int) -> Iterator[tuple[slice, slice]]:
    cols = min(n, 512)
    rows = max(1, TILE_PRODUCTS // (cols * rank))
    for i in range(0, m, rows):
        for j in range(0, n, cols):
            yield slice(i, min(i + rows, m)), slice(j, min(j + cols, n))


def _select(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> Tensor:
    """Radix select on the bits of |K|, which order as the floats do: each pass counts one digit of the
    entries that share the digits settled so far. Counts and choices stay on the device."""
    n, m, rank = A.shape[0], B.shape[0], A.shape[1]
    bits = torch.int32 if A.dtype == torch.float32 else torch.int64
    width = 31 if bits is torch.int32 else 63
    remaining = torch.full((), num_zeroed(sparsity, m * n), device=A.device)
    prefix = torch.zeros((), dtype=bits, device=A.device)
    for top in range(width, 0, -RADIX_BITS):
        shift = max(top - RADIX_BITS, 0)
        digits = 1 << (top - shift)
        counts = torch.zeros(digits + 1, dtype=torch.int64, device=A.device)
        for i, j in _tiles(m, n, rank):
            keys = kernel_matrix(A[j], B[i], theta, kernel=kernel, groups=groups).abs().view(bits)
            match = (keys >> (top - 1) >> 1) == prefix
            digit = torch.where(match, keys >> shift & (digits - 1), digits).flatten()
            counts.scatter_add_(0, digit.long(), torch.ones_like(digit, dtype=torch.int64))
        cumulative = counts[:digits].cumsum(0)
        chosen = (cumulative < remaining).sum()
        remaining = remaining - torch.where(chosen > 0, cumulative[(chosen - 1).clamp(min=0)], 0)
        prefix = (prefix << (top - shift)) | chosen.to(bits)
    return prefix.view(A.dtype)


def _fingerprint(*tensors: Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.digest()


@torch.no_grad()
def select_threshold(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> Tensor:
    if A.device.type != "cpu":
        return _select(A, B, theta, sparsity, kernel, groups)
    key = (_fingerprint(A, B, theta), A.shape, B.shape, A.dtype, sparsity, kernel, groups)
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
    for i, j in _tiles(*out.shape, A.shape[1]):
        K = kernel_matrix(A[j], B[i], theta, kernel=kernel, groups=groups)
        gates = gate_values(K, tau, gate=gate)
        _write(out[i, j], None if weight is None else weight[i, j], K * gates)


def _write(out: Tensor, weight: Tensor | None, delta: Tensor) -> None:
    # Where dW is 0 the base weight passes through untouched: adding +0 would turn -0 into +0.
    out.copy_(delta if weight is None else torch.where(delta == 0, weight, weight + delta))


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
    for i, j in _tiles(*G.shape, A.shape[1]):
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
