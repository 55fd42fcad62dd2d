"""How far an operation in the factors' precision may lie from the float64 reference, entry by entry.

Every bound follows from the formulas: eps times the number of roundings times the sum of the magnitudes
that were rounded, carried through the gate and the derivatives. Nothing here is fitted to a backend.
The tests and ``snell doctor`` judge by these bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from snell import reference


@dataclass(frozen=True)
class Update:
    """Factors and settings of one update, with tau as the backend under test selected it."""

    A: Tensor
    B: Tensor
    theta: Tensor
    kernel: str
    groups: int
    gate: str
    tau: Tensor

    @property
    def eps(self) -> float:
        return torch.finfo(self.A.dtype).eps

    @property
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.A.double(), self.B.double(), self.theta.double()

    def K(self) -> Tensor:
        """K in float64."""
        return reference.kernel_matrix(*self.exact, kernel=self.kernel, groups=self.groups)

    def K_error(self) -> Tensor:
        """Bound on a backend's K: each statistic sums r products or squares of once-rounded terms."""
        A, B, theta = self.exact
        rounding = 2 * (A.shape[1] + 8) * self.eps
        if self.kernel == "piecewise_linear":
            norms = [_distance(a, b) for a, b in _groups(A, B, self.groups)]
            return rounding * sum(alpha.abs() * norm for alpha, norm in zip(theta, norms, strict=True))
        dot_error = rounding * (B.abs() @ A.abs().T)
        if self.kernel == "linear":
            return dot_error
        alpha, beta, gamma = theta.abs()
        if self.kernel == "sigmoid":
            unit_error = beta * dot_error / 4 + 16 * self.eps
        else:
            exponent = beta * _distance(A, B).square()
            unit_error = torch.exp(-theta[1] * _distance(A, B).square()) * (exponent * rounding + 16 * self.eps)
        return alpha * unit_error + 4 * self.eps * (alpha + gamma)

    def gates(self) -> tuple[Tensor, Tensor]:
        """Gates in float64, and their bound; an entry whose \\|K\\| is within rounding of tau may win or lose."""
        K, error, tau = self.K(), self.K_error(), self.tau.double()
        a, gates = K.abs(), reference.gate_values(K, tau, gate=self.gate)
        if self.gate == "none":
            return gates, torch.zeros_like(gates)
        if self.gate == "soft":
            return gates, torch.where(a + error <= tau, 0, error + 2 * self.eps * gates)
        undecided = (a - tau).abs() <= error
        won = a if self.gate == "magnitude" else torch.ones_like(a)
        spread = error * (gates > 0) if self.gate == "magnitude" else torch.zeros_like(a)
        return gates, torch.where(undecided, won + error, spread)

    def delta(self) -> tuple[Tensor, Tensor]:
        """dW in float64, and its bound."""
        K, error = self.K(), self.K_error()
        gates, gate_error = self.gates()
        bound = K.abs() * gate_error + gates * error + gate_error * error
        return K * gates, bound + 4 * self.eps * (K * gates).abs() + _tiny(self.A.dtype)

    def merged(self, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """dW or weight + dW in float64, and the bound once rounded to ``dtype``."""
        value, bound = self.delta()
        if weight is not None:
            value = value + weight.double()
            bound = bound + self.eps * (value.abs() + weight.double().abs())
        return value, rounded(value, bound, dtype)

    def gradients(self, G: Tensor, G_error: Tensor | float = 0.0) -> dict[str, tuple[Tensor, Tensor]]:
        """Gradients of A, B and theta for G, in float64, and their bounds."""
        A, B, theta = leaves = tuple(t.clone().requires_grad_() for t in self.exact)
        merged = reference.merge(A, B, theta, self.tau.double(), kernel=self.kernel, groups=self.groups, gate=self.gate)
        values = torch.autograd.grad(merged, leaves, G.double(), materialize_grads=True, allow_unused=True)
        names = ("grad_A", "grad_B", "grad_theta")
        return dict(zip(names, zip(values, self._gradient_bounds(G.double(), G_error), strict=True), strict=True))

    def _gradient_bounds(self, G: Tensor, G_error: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        A, B, theta = self.exact
        gates, gate_error = self.gates()
        H = (G * gates).abs()
        H_error = G.abs() * gate_error + (gates + gate_error) * G_error + 2 * self.eps * H
        rounding = 2 * (A.shape[1] + 8) * self.eps
        if self.kernel == "linear":
            bounds = self._products(H, H_error, A, B)
            return *bounds, torch.zeros_like(theta)
        if self.kernel == "piecewise_linear":
            parts, thetas = [], []
            for alpha, (a, b) in zip(theta.abs(), _groups(A, B, self.groups), strict=True):
                norm = _distance(a, b)
                thetas.append(self._total(H * norm, (H_error + rounding * H) * norm))
                C, C_error = (torch.where(norm == 0, 0, alpha * h / norm) for h in (H, H_error))
                parts.append(self._products(C, C_error + rounding * C, a, b, distance=True))
            bound_A, bound_B = (torch.cat(side, 1) for side in zip(*parts, strict=True))
            return bound_A, bound_B, torch.stack(thetas)
        alpha, beta, _ = theta.abs()
        if self.kernel == "sigmoid":
            statistic, magnitude = B @ A.T, B.abs() @ A.abs().T
            unit = torch.sigmoid(theta[1] * statistic)
            unit_error = beta * rounding * magnitude / 4 + 16 * self.eps
            slope, slope_error = alpha * unit * (1 - unit), alpha * unit_error
            factor, distance = beta, False
        else:
            statistic = magnitude = _distance(A, B).square()
            unit = torch.exp(-theta[1] * statistic)
            unit_error = unit * (beta * statistic * rounding + 16 * self.eps)
            slope, slope_error = alpha * unit, alpha * unit_error
            factor, distance = 2 * beta, True
        S, S_error = H * slope, H_error * slope + (H + H_error) * slope_error
        grads = self._products(factor * S, factor * (S_error + 8 * self.eps * S), A, B, distance=distance)
        return *grads, torch.stack(
            (
                self._total(H * unit, H_error * unit + (H + H_error) * unit_error),
                self._total(S * statistic.abs(), S_error * statistic.abs() + S * rounding * magnitude),
                self._total(H, H_error),
            )
        )

    def _products(
        self, C: Tensor, error: Tensor, A: Tensor, B: Tensor, *, distance: bool = False
    ) -> tuple[Tensor, Tensor]:
        """C^T B and C A; of a distance, colsum(C) A - C^T B and rowsum(C) B - C A, rounded each for itself."""
        A, B, m, n = A.abs(), B.abs(), B.shape[0], A.shape[0]
        grown_A, grown_B = error + growth(m) * self.eps * C, error + growth(n) * self.eps * C
        bound_A, bound_B = grown_A.T @ B, grown_B @ A
        if distance:
            bound_A = bound_A + grown_A.sum(0).unsqueeze(1) * A
            bound_B = bound_B + grown_B.sum(1, keepdim=True) * B
        return bound_A + _tiny(self.A.dtype), bound_B + _tiny(self.A.dtype)

    def _total(self, terms: Tensor, error: Tensor) -> Tensor:
        return error.sum() + growth(terms.numel()) * self.eps * terms.sum() + _tiny(self.A.dtype)


#: Share of G by which a GPU's factor gradients may take it wrong where G comes in half precision: their products are
#: tf32 products, two roundings of 2^-11, or 2^-10 where bits are cut off.
TF32_ERROR = 2**-9


def layer(
    update: Update, x: Tensor, weight: Tensor | None, bias: Tensor | None, grad_y: Tensor, tf32_error: float = 0.0
) -> dict[str, tuple[Tensor, Tensor]]:
    """y and the gradients of the layer in float64, with their bounds: those of its GEMMs around the update's.

    Args:
        update: ``A [n, r]`` and ``B [m, r]``.
        x, grad_y: ``[..., n]`` and ``[..., m]``; results are ``[tokens, n]`` and ``[tokens, m]``.
        weight: ``[m, n]``, or None for the update's share alone, ``x dW^T``.
        bias: ``[m]`` or None.
        tf32_error: what G's entries may be off by, as a share of them, beyond the rounding of its GEMM.
    """
    dtype, eps = x.dtype, torch.finfo(x.dtype).eps
    m, n, tokens = update.B.shape[0], update.A.shape[0], x.numel() // x.shape[-1]
    x, grad_y = x.double().reshape(-1, n), grad_y.double().reshape(-1, m)
    merged, merged_error = update.merged(weight, dtype)
    # A product of half-precision matrices is accumulated in float32 and rounded once.
    single = max(update.eps, torch.finfo(torch.float32).eps) if eps > 1e-6 else eps

    def product(left: Tensor, right: Tensor, right_error: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        return left @ right, left.abs() @ right_error + growth(terms) * single * (left.abs() @ right.abs())

    y, y_error = product(x, merged.T, merged_error.T, n)
    if bias is not None:
        y, y_error = y + bias.double(), y_error + single * (y.abs() + bias.double().abs())
    grad_x, grad_x_error = product(grad_y, merged, merged_error, m)
    G, G_error = product(grad_y.T, x, torch.zeros_like(x), tokens)
    G_error = rounded(G, G_error, dtype) + tf32_error * G.abs()
    return {
        "y": (y, rounded(y, y_error, dtype)),
        "grad_x": (grad_x, rounded(grad_x, grad_x_error, dtype)),
        **update.gradients(G, G_error),
    }


def growth(terms: int) -> float:
    """Roundings that a sum of ``terms`` may gather: all of them, or 8 sqrt of many (they do not all agree)."""
    return 8 + min(terms, 8 * math.sqrt(terms))


def rounded(value: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """``bound`` after rounding to ``dtype``."""
    return bound + torch.finfo(dtype).eps * (value.abs() + bound) + _tiny(dtype)


def share_of_bound(actual: Tensor, value: Tensor, bound: Tensor) -> float:
    """The largest error of an entry of ``actual``, as a share of its bound; infinite where an entry is NaN."""
    error = (actual.double() - value).abs()
    share = torch.where(
        error <= bound, torch.where(error == 0, 0, error / bound), (error / bound).nan_to_num(torch.inf)
    )
    return share.max().item() if share.numel() else 0.0


def assert_within(actual: Tensor, value: Tensor, bound: Tensor, name: str) -> None:
    """Every entry of ``actual`` is within its bound of ``value``."""
    assert actual.shape == value.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(value.shape)}"
    share = share_of_bound(actual, value, bound)
    assert share <= 1, f"{name}: an entry is {share:.3g} x its bound off"


def _tiny(dtype: torch.dtype) -> float:
    # Products of the gate's size may fall below the smallest normal number, where spacing no longer shrinks.
    return torch.finfo(dtype).tiny if dtype != torch.float16 else torch.finfo(dtype).smallest_normal * 2**-9


def _distance(A: Tensor, B: Tensor) -> Tensor:
    return torch.cdist(B, A, compute_mode="donot_use_mm_for_euclid_dist")


def _groups(A: Tensor, B: Tensor, groups: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(A.chunk(groups, 1), B.chunk(groups, 1), strict=True)
