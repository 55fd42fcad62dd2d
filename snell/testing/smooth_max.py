"""The smooth maxima of columns and their gradients in float64, each with its bound."""

from __future__ import annotations

import torch
from torch import Tensor

from snell.kernel_functions import guarded
from snell.kernel_functions import smooth_max as of_matrix
from snell.spec import Spec
from snell.testing import bounds
from snell.testing.softmax import EXP, Softmax
from snell.update import Update

__all__ = ["smooth_max"]


def smooth_max(update: Update, grad: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The smooth maxima, and the gradients of A, B and theta from ``grad [n]``, in float64 with bounds.

    Args:
        update: of a kernel function with a softmax; the gradients are those at its own smooth maxima.
    """
    spec, theta, m = update.spec, update.theta.detach().double(), len(update.B)
    assert update.smooth_max is not None
    assert spec.function.softmax_of is not None
    under = Spec(spec.rank, 0.0, spec.function.softmax_of, spec.groups).applied
    exact = bounds.Expected(Update(*update[:2], update.theta[:-3], update.tau, under))
    K, K_error, gamma, eps = exact.K(), exact.K_error(), guarded(theta[-1]), exact.eps
    value = of_matrix(K, gamma)
    top = torch.where(gamma > 0, K.amax(0), K.amin(0))
    # No more than K is off in a column, then the sum's and the logarithm's roundings, and those of the last sum.
    summed = gamma.abs() * eps * (bounds.growth(m) + 2 * EXP)
    bound = K_error.amax(0) + summed + 4 * eps * (top.abs() + (value - top).abs())
    given = update.smooth_max.detach().double()
    S = Softmax.of(K, K_error, given, gamma, eps)
    grad = grad.detach().double()
    G, G_error = grad * S.value, grad.abs() * (S.error + 2 * eps * S.value)
    inner = exact.gradients(G, G_error)
    terms = (G * S.exponent).abs()
    error = G_error * S.exponent.abs() + (G.abs() + G_error) * S.exponent_error
    by_gamma = error.sum() + bounds.growth(terms.numel()) * eps * terms.sum()
    grad_theta, theta_bound = torch.zeros_like(theta), torch.zeros_like(theta)
    grad_theta[-1], theta_bound[-1] = -(G * S.exponent).sum(), by_gamma
    return {
        "smooth_max": (value, bound),
        "grad_A": inner["grad_A"],
        "grad_B": inner["grad_B"],
        "grad_theta": (grad_theta, theta_bound),
    }
