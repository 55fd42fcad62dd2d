"""NVIDIA GPUs: the kernels of :mod:`snell.kernels`, launched on the tensors' device and current stream.

Float64 factors, which only gradient checks have, run on the blocked backend: the kernels decide
survivors in float32, and one layer must not mix the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snell.backends import blocked
from snell.kernels import factor_grad as factor_grad_kernels
from snell.kernels import merge as merge_kernels
from snell.kernels.selection import Update, select_thresholds


def select_threshold(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> Tensor:
    if A.dtype == torch.float64:
        return blocked.select_threshold(A, B, theta, sparsity, kernel, groups)
    if sparsity == 0.0:
        return A.new_zeros(())
    return select_thresholds([Update(A, B, theta, sparsity)], kernel, groups).squeeze(0)


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
    backend = blocked if A.dtype == torch.float64 else merge_kernels
    backend.merge_out(A, B, theta, tau, weight, out, kernel, groups, gate)


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
    backend = blocked if A.dtype == torch.float64 else factor_grad_kernels
    backend.factor_grad(G, A, B, theta, tau, weight, merged, grad_A, grad_B, grad_theta, kernel, groups, gate)
