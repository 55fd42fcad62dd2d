"""How rounding moves a softmax over columns, and a kernel function made with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snell.kernel_functions import guarded

__all__ = ["EXP", "Softmax"]

#: Units in the last place that an exponential may be off by.
EXP = 16


@dataclass(frozen=True)
class Softmax:
    """S of given smooth maxima in float64, ``[m, n]``, with its exponents, and bounds on both.

    Attributes:
        gamma: guarded.
    """

    K: Tensor
    exponent: Tensor
    exponent_error: Tensor
    value: Tensor
    error: Tensor
    gamma: Tensor

    @classmethod
    def of(cls, K: Tensor, K_error: Tensor, smooth_max: Tensor, gamma: Tensor, eps: float) -> Softmax:
        gamma = guarded(gamma)
        exponent = (K - smooth_max) / gamma
        error = K_error / gamma.abs() + 4 * eps * exponent.abs()
        value = exponent.exp()
        return cls(K, exponent, error, value, value * (error.expm1() + EXP * eps), gamma)

    def mixture(
        self, error: Tensor, slopes: list[tuple[Tensor, Tensor]], scalars: Tensor, eps: float
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """The bounds of K + alpha S + beta, its slopes and those by constants, scalars and smooth maxima.

        Args:
            error, slopes: those of the K under the softmax.
            scalars: alpha, beta and gamma.
        """
        alpha, beta, _ = scalars.abs()
        # The softmax's share of the slope by K, and the slope by the smooth maximum.
        share = alpha * self.value / self.gamma.abs()
        share_error = alpha * self.error / self.gamma.abs() + 8 * eps * share
        through = [(C * (1 + share), off * (1 + share) + C * (share_error + 2 * eps)) for C, off in slopes]
        none, one, exponent = torch.zeros_like(share), torch.ones_like(share), self.exponent.abs()
        by_gamma = share * exponent, share_error * exponent + (share + share_error) * self.exponent_error
        thetas = [(none, none)] * len(slopes) + [(self.value, self.error), (one, none), by_gamma]
        rounding = 4 * eps * (self.K.abs() + alpha * self.value + beta)
        return error + alpha * self.error + rounding, through, thetas, (share, share_error)
