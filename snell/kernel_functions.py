"""The table of kernel functions. Each is a scalar function of pair statistics.

A pair statistic of two rows ``b`` and ``a`` is their dot product or their distance ``norm2(b - a)``, over the whole
rank axis or over each of its groups. docs/method.md lists the steps to add a kernel function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GAMMA_LEAST", "KERNEL_FUNCTIONS", "KernelFunction"]

#: The least \|gamma\| of a softmax; values nearer to 0 are moved to it. One unit in the last place of K = 1 then
#: changes an exponent by 1/8.
GAMMA_LEAST = 2.0**-20


def _distance(B: Tensor, A: Tensor) -> Tensor:
    # Differences, not |b|^2 + |a|^2 - 2 b.a, which cancels where b is near a. The gradient at 0 is 0.
    return torch.cdist(B, A, compute_mode="donot_use_mm_for_euclid_dist")


def _dot(B: Tensor, A: Tensor) -> Tensor:
    # B @ A.T sums in an order that depends on the shape. Here a block of K has the same bits as in the whole matrix.
    return (B.unsqueeze(1) * A).sum(-1)


# MKL's exp chooses its code in its first call. Where that came from two threads at once, one got results 3e-9 off
# (torch 2.13), so the first call is made by one thread.
for _dtype in (torch.float32, torch.float64):
    torch.zeros(1, dtype=_dtype, device="cpu").exp()

_STATISTICS = {"distance": _distance, "dot": _dot}


@dataclass(frozen=True)
class KernelFunction:
    """A scalar function of pair statistics.

    Attributes:
        statistic: ``"dot"`` (``b . a``) or ``"distance"`` (``norm2(b - a)``).
        grouped: whether there is one statistic per group of the rank axis, or only one.
        trains_theta: whether the scalar parameters are trained by default.
        initial_theta: ``(groups, scale) ->`` the initial scalar parameters.
        value: ``(statistics, theta) -> K``, elementwise over ``[m, n]`` statistics and differentiable. With a softmax
            its third argument is ``smooth_max``, ``[n]`` or ``[m, 1]``.
        softmax_of: the kernel function whose softmax over each column is a part of K. Its theta is the first part of
            theta; alpha, beta and gamma follow. None: K_ij depends on ``B_i`` and ``A_j`` alone.
    """

    statistic: str
    grouped: bool
    trains_theta: bool
    initial_theta: Callable[[int, float], list[float]]
    value: Callable[..., Tensor]
    softmax_of: str | None = None

    def num_statistics(self, groups: int) -> int:
        """Number of statistics that :attr:`value` takes."""
        return groups if self.grouped else 1

    def statistics(self, A: Tensor, B: Tensor, groups: int) -> list[Tensor]:
        """The statistics of all pairs of rows of ``B [m, r]`` and ``A [n, r]``, each ``[m, n]``."""
        count, pair = self.num_statistics(groups), _STATISTICS[self.statistic]
        return [pair(b, a) for b, a in zip(B.chunk(count, 1), A.chunk(count, 1), strict=True)]


def _signs(groups: int, scale: float) -> list[float]:
    return [scale * (-1.0) ** p for p in range(groups)]


def _piecewise_linear(statistics: Sequence[Tensor], theta: Tensor) -> Tensor:
    return sum(alpha * norm for alpha, norm in zip(theta, statistics, strict=True))


def _sigmoid(statistics: Sequence[Tensor], theta: Tensor) -> Tensor:
    alpha, beta, gamma = theta
    z = beta * statistics[0]
    # torch.sigmoid gives other bits at other positions in a tensor. The exponent here never overflows.
    negative = z < 0
    e = torch.exp(torch.where(negative, z, -z))
    return alpha * (torch.where(negative, e, 1) / (1 + e)) + gamma


def _rbf(statistics: Sequence[Tensor], theta: Tensor) -> Tensor:
    alpha, beta, gamma = theta
    return alpha * torch.exp(-beta * statistics[0].square()) + gamma


def guarded(gamma: Tensor) -> Tensor:
    """gamma, moved to +-GAMMA_LEAST where it is nearer to 0. The derivative is that of gamma itself."""
    sign = torch.where(gamma.detach() < 0, -1.0, 1.0)
    return torch.where(gamma.abs() < GAMMA_LEAST, gamma - gamma.detach() + sign * GAMMA_LEAST, gamma)


def smooth_max(K: Tensor, gamma: Tensor) -> Tensor:
    """``gamma log sum_i exp(K_ij / gamma)`` of each column of ``K [m, n]``; gamma is guarded."""
    gamma = guarded(gamma)
    # The largest exponent is 0, so nothing overflows: K / gamma itself may.
    top = torch.where(gamma > 0, K.amax(0), K.amin(0)).detach()
    return top + gamma * ((K - top) / gamma).exp().sum(0).log()


def _mixture(statistics: Sequence[Tensor], theta: Tensor, smooth_max: Tensor) -> Tensor:
    alpha, beta, gamma = theta[-3:]
    K = _piecewise_linear(statistics, theta[:-3].detach())
    return K + alpha * torch.exp((K - smooth_max) / guarded(gamma)) + beta


# theta of sigmoid and rbf is alpha, beta, gamma. gamma starts at the value that makes kappa(0, 0) = 0.
KERNEL_FUNCTIONS: dict[str, KernelFunction] = {
    "piecewise_linear": KernelFunction("distance", True, False, _signs, _piecewise_linear),
    "linear": KernelFunction("dot", False, False, lambda groups, scale: [], lambda statistics, theta: statistics[0]),
    "sigmoid": KernelFunction("dot", False, True, lambda groups, scale: [scale, 1.0, -scale / 2], _sigmoid),
    "rbf": KernelFunction("distance", False, True, lambda groups, scale: [scale, 1.0, -scale], _rbf),
    "mixture": KernelFunction(
        "distance",
        True,
        True,
        lambda groups, scale: [*_signs(groups, scale), 1.0, 0.0, 1.0],
        _mixture,
        "piecewise_linear",
    ),
}
