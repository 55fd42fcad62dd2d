"""Error bounds: how far each entry of an operation's result may be from the float64 reference.

Every bound follows from the formulas: eps times the number of roundings times the sum of the magnitudes that were
rounded, carried through the gate and the derivatives. Nothing here is fitted to a backend. The tests and ``snell
doctor`` judge by these bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snell import backends, reference
from snell.testing.softmax import Softmax
from snell.update import Update


class _Statistic(NamedTuple):
    """A pair statistic ``[m, n]`` in float64, and the error bound of a backend's. Distances are not squared."""

    value: Tensor
    error: Tensor


class _Scalar(NamedTuple):
    """Magnitudes that a kernel function's bounds are made of, all ``[m, n]``.

    Attributes:
        error: bound on K.
        slopes: of K by each statistic, a distance's divided by the norm; thetas: of K by each scalar parameter;
            maxima: of K by the smooth maxima, if it has a softmax. Each with the bound on it.
    """

    error: Tensor
    slopes: list[tuple[Tensor, Tensor]]
    thetas: list[tuple[Tensor, Tensor]]
    maxima: tuple[Tensor, Tensor] | None = None


def _piecewise_linear(s: list[_Statistic], theta: Tensor, eps: float) -> _Scalar:
    alphas = theta.abs()
    slopes = [torch.where(norm == 0, 0, alpha / norm) for alpha, (norm, _) in zip(alphas, s, strict=True)]
    relative = [torch.where(norm == 0, 0, error / norm) for norm, error in s]
    error = torch.stack([alpha * norm_error for alpha, (_, norm_error) in zip(alphas, s, strict=True)]).sum(0)
    return _Scalar(error, [(C, C * r) for C, r in zip(slopes, relative, strict=True)], [(n, e) for n, e in s])


def _linear(s: list[_Statistic], theta: Tensor, eps: float) -> _Scalar:
    one = torch.ones_like(s[0].value)
    return _Scalar(s[0].error, [(one, torch.zeros_like(one))], [])


def _sigmoid(s: list[_Statistic], theta: Tensor, eps: float) -> _Scalar:
    (alpha, beta, _), (dot, dot_error) = theta.abs(), s[0]
    unit = torch.sigmoid(theta[1] * dot)
    unit_error = beta * dot_error / 4 + 16 * eps
    slope, slope_error = alpha * unit * (1 - unit), alpha * unit_error
    return _of_unit(s[0], theta, eps, (unit, unit_error), (slope, slope_error), beta)


def _rbf(s: list[_Statistic], theta: Tensor, eps: float) -> _Scalar:
    alpha, beta, _ = theta.abs()
    square = _Statistic(s[0].value.square(), s[0].value * s[0].error)
    unit = torch.exp(-theta[1] * square.value)
    unit_error = unit * (beta * square.error + 16 * eps)
    return _of_unit(square, theta, eps, (unit, unit_error), (alpha * unit, alpha * unit_error), 2 * beta)


def _of_unit(
    s: _Statistic,
    theta: Tensor,
    eps: float,
    unit: tuple[Tensor, Tensor],
    slope: tuple[Tensor, Tensor],
    factor: Tensor,
) -> _Scalar:
    """alpha * unit + gamma, where ``slope`` is alpha times the derivative of unit by beta * statistic."""
    alpha, _, gamma = theta.abs()
    by_beta = slope[0] * s.value.abs(), slope[1] * s.value.abs() + slope[0] * s.error
    by_gamma = torch.ones_like(unit[0]), torch.zeros_like(unit[0])
    error = alpha * unit[1] + 4 * eps * (alpha + gamma)
    return _Scalar(error, [(factor * slope[0], factor * (slope[1] + 8 * eps * slope[0]))], [unit, by_beta, by_gamma])


def _mixture(s: list[_Statistic], theta: Tensor, eps: float, smooth_max: Tensor) -> _Scalar:
    inner = _piecewise_linear(s, theta[:-3], eps)
    K = torch.einsum("p,pij->ij", theta[:-3], torch.stack([norm for norm, _ in s]))
    S = Softmax.of(K, inner.error, smooth_max, theta[-1], eps)
    return _Scalar(*S.mixture(inner.error, inner.slopes, theta[-3:], eps))


#: The error bounds of each kernel function's scalar arithmetic.
_ROWS: dict[str, Callable[..., _Scalar]] = {
    "piecewise_linear": _piecewise_linear,
    "linear": _linear,
    "sigmoid": _sigmoid,
    "rbf": _rbf,
    "mixture": _mixture,
}


#: Share of G that the Triton kernels' factor gradients may lose where G comes in half precision: their products are
#: tf32 products, on a GPU and interpreted, of operands rounded to within 2^-11 (derived in ``kernels/factor_grad.py``).
TF32_ERROR = 2**-10


@dataclass(frozen=True)
class Expected:
    """The results of an update's operations in float64, and the error bounds of a backend's.

    Attributes:
        update: factors in the backend's precision, and tau and smooth maxima as the backend under test found them.
    """

    update: Update

    @property
    def eps(self) -> float:
        return torch.finfo(self.update.A.dtype).eps

    @cached_property
    def exact(self) -> Update:
        """The update in float64."""
        A, B, theta, tau = (t.detach().double() for t in self.update[:4])
        maxima = self.update.smooth_max
        return Update(A, B, theta, tau, self.update.spec, None, None if maxima is None else maxima.detach().double())

    def K(self) -> Tensor:
        """K in float64."""
        A, B, theta, _, spec, _, maxima, *_ = self.exact
        return reference.kernel_matrix(A, B, theta, kernel=spec.kernel, groups=spec.groups, smooth_max=maxima)

    def K_error(self) -> Tensor:
        """Bound on a backend's K."""
        return self._scalar.error

    @cached_property
    def _statistics(self) -> list[_Statistic]:
        """Each is a sum of r products, or of r squares of rounded differences."""
        A, B, _, _, spec, *_ = self.exact
        rounding = 2 * (spec.rank + 8) * self.eps
        values = spec.function.statistics(A, B, spec.groups)
        if spec.function.statistic == "dot":
            return [_Statistic(value, rounding * (B.abs() @ A.abs().T)) for value in values]
        return [_Statistic(value, rounding * value) for value in values]

    @cached_property
    def _scalar(self) -> _Scalar:
        _, _, theta, _, spec, _, maxima, *_ = self.exact
        return _ROWS[spec.kernel](self._statistics, theta, self.eps, *([] if maxima is None else [maxima]))

    def gates(self) -> tuple[Tensor, Tensor]:
        """Gates in float64, and their bound. An entry whose \\|K\\| is within rounding of tau may survive or not."""
        K, error, tau, gate = self.K(), self.K_error(), self.exact.tau, self.exact.spec.gate
        a, gates = K.abs(), reference.gate_values(K, tau, gate=gate)
        if gate == "none":
            return gates, torch.zeros_like(gates)
        if gate == "soft":
            return gates, torch.where(a + error <= tau, 0, error + 2 * self.eps * gates)
        undecided = (a - tau).abs() <= error
        won = a if gate == "magnitude" else torch.ones_like(a)
        spread = error * (gates > 0) if gate == "magnitude" else torch.zeros_like(a)
        return gates, torch.where(undecided, won + error, spread)

    def delta(self) -> tuple[Tensor, Tensor]:
        """dW in float64, and its bound."""
        K, error = self.K(), self.K_error()
        gates, gate_error = self.gates()
        bound = K.abs() * gate_error + gates * error + gate_error * error
        return K * gates, bound + 4 * self.eps * (K * gates).abs() + _tiny(self.update.A.dtype)

    def merged(self, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """dW or weight + dW in float64, and the bound once rounded to ``dtype``."""
        value, bound = self.delta()
        if weight is not None:
            value = value + weight.double()
            bound = bound + self.eps * (value.abs() + weight.double().abs())
        return value, rounded(value, bound, dtype)

    def gradients(self, G: Tensor, G_error: Tensor | float = 0.0) -> dict[str, tuple[Tensor, Tensor]]:
        """Gradients of A, B, theta and smooth maxima for a G that is ``G_error`` off, in float64, and their bounds."""
        G_error = G_error + self.tf32_error(G.dtype) * G.double().abs()
        *factors, tau, spec, _, maxima = self.exact[:7]
        A, B, theta = leaves = [t.clone().requires_grad_() for t in factors]
        if maxima is not None:
            leaves.append(maxima := maxima.clone().requires_grad_())
        settings: dict[str, Any] = {"kernel": spec.kernel, "groups": spec.groups, "gate": spec.gate}
        merged = reference.merge(A, B, theta, tau, **settings, smooth_max=maxima)
        values = torch.autograd.grad(merged, leaves, G.double(), materialize_grads=True, allow_unused=True)
        names = ("grad_A", "grad_B", "grad_theta", "grad_smooth_max")[: len(leaves)]
        return dict(zip(names, zip(values, self._gradient_bounds(G.double(), G_error), strict=True), strict=True))

    def tf32_error(self, dtype: torch.dtype) -> float:
        """The share of a G of this dtype that the backend's products may lose."""
        rounds = dtype.itemsize == 2 and backends.of(self.update.A).name == "triton"
        return TF32_ERROR if rounds else 0.0

    def _gradient_bounds(self, G: Tensor, G_error: Tensor | float) -> list[Tensor]:
        A, B, theta, _, spec, *_ = self.exact
        gates, gate_error = self.gates()
        H = (G * gates).abs()
        H_error = G.abs() * gate_error + (gates + gate_error) * G_error + 2 * self.eps * H

        def carried(slope: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
            return H * slope, H_error * slope + (H + H_error) * error

        groups = zip(*(t.chunk(spec.num_statistics, 1) for t in (A, B)), self._scalar.slopes, strict=True)
        sides = [self._products(*carried(*slope), a, b) for a, b, slope in groups]
        bound_A, bound_B = (torch.cat(side, 1) for side in zip(*sides, strict=True))
        thetas = [self._total(*carried(*slope)) for slope in self._scalar.thetas]
        found = [bound_A, bound_B, torch.stack(thetas) if thetas else torch.zeros_like(theta)]
        if self._scalar.maxima is not None:
            terms, error = carried(*self._scalar.maxima)
            found.append(error.sum(0) + growth(len(B)) * self.eps * terms.sum(0) + _tiny(self.update.A.dtype))
        return found

    def _products(self, C: Tensor, error: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds on C^T B and C A; for distances, on colsum(C) A - C^T B and rowsum(C) B - C A."""
        A, B, m, n = A.abs(), B.abs(), B.shape[0], A.shape[0]
        grown_A, grown_B = error + growth(m) * self.eps * C, error + growth(n) * self.eps * C
        bound_A, bound_B = grown_A.T @ B, grown_B @ A
        if self.exact.spec.function.statistic == "distance":
            bound_A = bound_A + grown_A.sum(0).unsqueeze(1) * A
            bound_B = bound_B + grown_B.sum(1, keepdim=True) * B
        tiny = _tiny(self.update.A.dtype)
        return bound_A + tiny, bound_B + tiny

    def _total(self, terms: Tensor, error: Tensor) -> Tensor:
        return error.sum() + growth(terms.numel()) * self.eps * terms.sum() + _tiny(self.update.A.dtype)


def layer(
    expected: Expected, x: Tensor, weight: Tensor | None, bias: Tensor | None, grad_y: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """y and the gradients of the layer in float64, with bounds that combine the update's and the GEMMs'.

    Args:
        expected: of the update.
        x, grad_y: ``[..., n]`` and ``[..., m]``; results are ``[tokens, n]`` and ``[tokens, m]``.
        weight: ``[m, n]``, or None for the update's share alone, ``x dW^T``.
        bias: ``[m]`` or None.
    """
    dtype, eps = x.dtype, torch.finfo(x.dtype).eps
    (m, n), tokens = expected.update.shape, x.numel() // x.shape[-1]
    x, grad_y = x.double().reshape(-1, n), grad_y.double().reshape(-1, m)
    merged, merged_error = expected.merged(weight, dtype)
    # A product of half-precision matrices is accumulated in float32 and rounded once.
    single = max(expected.eps, torch.finfo(torch.float32).eps) if eps > 1e-6 else eps

    def product(left: Tensor, right: Tensor, right_error: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        return left @ right, left.abs() @ right_error + growth(terms) * single * (left.abs() @ right.abs())

    y, y_error = product(x, merged.T, merged_error.T, n)
    if bias is not None:
        y, y_error = y + bias.double(), y_error + single * (y.abs() + bias.double().abs())
    grad_x, grad_x_error = product(grad_y, merged, merged_error, m)
    G, G_error = product(grad_y.T, x, torch.zeros_like(x), tokens)
    G_error = rounded(G, G_error, dtype) + expected.tf32_error(dtype) * G.abs()
    return {
        "y": (y, rounded(y, y_error, dtype)),
        "grad_x": (grad_x, rounded(grad_x, grad_x_error, dtype)),
        **expected.gradients(G, G_error),
    }


def growth(terms: int) -> float:
    """How many roundings a sum of ``terms`` may accumulate. Those of many have random signs: 8 sqrt(terms) at most."""
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
    # Small products may be subnormal, where the relative error of a rounding exceeds eps.
    return torch.finfo(dtype).tiny if dtype != torch.float16 else torch.finfo(dtype).smallest_normal * 2**-9
