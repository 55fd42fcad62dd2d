"""The definition of the method in plain PyTorch, with dense matrices. Kernel functions are in ``kernel_functions``.

Everything else in the package is tested against this module in float64. It stores K and is slow. The gate and tau are
detached, so autograd through it gives the defining gradients.

Shapes: ``A [n, r]``, ``B [m, r]``, ``theta [t]``, ``tau []``, ``weight [m, n]``, ``bias [m]``, ``x [..., n]``.
Source: SNELL, arXiv 2411.01800, equations 3 to 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.kernel_functions import smooth_max as of_matrix
from snell.spec import Spec

__all__ = ["edit", "gate_values", "kernel_matrix", "merge", "select_threshold", "snell_linear"]


def kernel_matrix(
    A: Tensor, B: Tensor, theta: Tensor, *, kernel: str, groups: int, smooth_max: Tensor | None = None
) -> Tensor:
    """``K_ij = kappa(B_i, A_j)`` of shape [m, n], differentiable in A, B and theta.

    A softmax is that over all rows given, unless the columns' smooth maxima ``[n]`` are given too.
    """
    if A.dtype in (torch.float16, torch.bfloat16):
        A, B, theta = A.float(), B.float(), theta.float()
    if kernel not in KERNEL_FUNCTIONS:
        raise ValueError(f"kernel is unknown: {kernel!r}")
    function = KERNEL_FUNCTIONS[kernel]
    statistics = function.statistics(A, B, groups)
    if function.softmax_of is None:
        return function.value(statistics, theta)
    if smooth_max is None:
        K = KERNEL_FUNCTIONS[function.softmax_of].value(statistics, theta[:-3].detach())
        smooth_max = of_matrix(K, theta[-1])
    return function.value(statistics, theta, smooth_max)


def gate_values(K: Tensor, tau: Tensor, *, gate: str) -> Tensor:
    """The gate of each entry of K: 0 if \\|K\\| <= tau, NaN if K is NaN. A constant for autograd."""
    a = K.detach().abs()
    if gate == "none":
        return torch.ones_like(a)
    if gate == "soft":
        return (a - tau).clamp(min=0)
    value = a if gate == "magnitude" else torch.where(a.isnan(), a, torch.ones_like(a))
    return torch.where(a <= tau, torch.zeros_like(a), value)


def select_threshold(A: Tensor, B: Tensor, theta: Tensor, *, sparsity: float, kernel: str, groups: int) -> Tensor:
    """tau, the ceil(s*m*n)-th smallest \\|K\\|; 0 if the sparsity is 0."""
    with torch.no_grad():
        magnitudes = kernel_matrix(A, B, theta, kernel=kernel, groups=groups).abs().flatten()
        k = Spec(A.shape[1], sparsity, kernel, groups).num_zeroed(magnitudes.numel())
        return magnitudes.kthvalue(k).values if k else magnitudes.new_zeros(())


def merge(
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor,
    *,
    weight: Tensor | None = None,
    kernel: str,
    groups: int,
    gate: str,
    start: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    smooth_max: Tensor | None = None,
) -> Tensor:
    """``dW = K * gate(|K|)`` in the factors' dtype, or ``W0 + dW`` in the weight's.

    With ``start``, a constant A, B, theta and tau, dW is less by the same of those: 0 where they are equal.
    """
    K = kernel_matrix(A, B, theta, kernel=kernel, groups=groups, smooth_max=smooth_max)
    delta = K * gate_values(K, tau, gate=gate)
    if start is not None:
        delta = delta - merge(*start, kernel=kernel, groups=groups, gate=gate)
    return delta if weight is None else (weight + delta).to(weight.dtype)


def snell_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    *,
    sparsity: float,
    kernel: str,
    groups: int,
    gate: str,
) -> Tensor:
    """``y = x (W0 + dW)^T + bias`` of shape [..., m]."""
    spec = Spec(A.shape[1], sparsity, kernel, groups, gate)
    tau = select_threshold(A, B, theta, sparsity=sparsity, kernel=kernel, groups=groups)
    merged = merge(A, B, theta, tau, weight=weight, kernel=kernel, groups=groups, gate=spec.effective_gate)
    return torch.nn.functional.linear(x, merged, bias)


def edit(u: Tensor, scaling: Tensor, bias: Tensor) -> Tensor:
    """``scaling * u + bias`` along the last axis: the edit of a layer's outputs (RED, arXiv 2402.15179)."""
    return scaling * u + bias
