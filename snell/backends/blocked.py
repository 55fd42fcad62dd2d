"""Plain PyTorch in tiles, for devices and dtypes without a faster backend.

K comes from the reference, one tile at a time, so nothing of size m*n is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from snell.backends.base import Backend
from snell.reference import gate_values
from snell.update import Activations, Gradients, Update

#: Most entries of K in a tile times the rank: the reference's dot stores that many products.
TILE_PRODUCTS = 2**21


class BlockedBackend(Backend):
    """Serves every device and dtype."""

    name = "blocked"

    def merge(self, update: Update, weight: Tensor | None, out: Tensor) -> None:
        for i, j in _tiles(update):
            _write(out[i, j], None if weight is None else weight[i, j], _delta(update, i, j)[1])

    @torch.no_grad()
    def factor_grad(
        self,
        G: Tensor | Activations,
        update: Update,
        grads: Gradients,
        weight: Tensor | None = None,
        merged: Tensor | None = None,
    ) -> None:
        if isinstance(G, Activations):
            G = G.product()
        for i, j in _tiles(update):
            gates, delta = _delta(update, i, j)
            H = torch.where(gates == 0, 0, G[i, j].to(gates.dtype) * gates)
            if merged is not None:
                _write(merged[i, j], None if weight is None else weight[i, j], delta)
            with torch.autocast(G.device.type, enabled=False):  # autocast would round the products to half precision
                tile = update.rows(i).columns(j)
                maxima = None if grads.smooth_max is None else grads.smooth_max[i if update.of_rows else j]
                _accumulate(H, tile, Gradients(grads.A[j], grads.B[i], grads.theta, maxima))


def _tiles(update: Update) -> Iterator[tuple[slice, slice]]:
    m, n = update.shape
    cols = max(min(n, 512), 1)  # a piece of a split weight may be empty
    rows = max(1, TILE_PRODUCTS // (cols * update.spec.rank))
    for i in range(0, m, rows):
        for j in range(0, n, cols):
            yield slice(i, min(i + rows, m)), slice(j, min(j + cols, n))


def _delta(update: Update, i: slice, j: slice) -> tuple[Tensor, Tensor]:
    """A tile's gates and dW."""
    A, B, theta, tau, spec, start, *_ = update
    statistics = spec.function.statistics(A[j], B[i], spec.groups)
    K = spec.function.value(statistics, theta, *_maxima(update.rows(i).columns(j)))
    gates = gate_values(K, tau, gate=spec.gate)
    return gates, K * gates if start is None else K * gates - _delta(start, i, j)[1]


def _maxima(tile: Update) -> list[Tensor]:
    """The smooth maxima as a kernel function takes them, if it does."""
    if tile.spec.function.softmax_of is None:
        return []
    assert tile.smooth_max is not None
    return [tile.smooth_max.unsqueeze(1) if tile.of_rows else tile.smooth_max]


def _write(out: Tensor, weight: Tensor | None, delta: Tensor) -> None:
    # Where dW is 0 the base weight is copied: adding +0 would turn -0 into +0. It is converted to out's dtype directly,
    # because a NaN could lose its bits in a conversion through another dtype.
    out.copy_(
        delta if weight is None else torch.where(delta == 0, weight.to(out.dtype), (weight + delta).to(out.dtype))
    )


def _accumulate(H: Tensor, tile: Update, grads: Gradients) -> None:
    """Add sum H * dK to the three gradients in place. Autograd differentiates only the scalar function."""
    A, B, theta, _, spec, *_ = tile
    function = spec.function
    theta = theta.detach().requires_grad_()
    statistics = [s.detach().requires_grad_() for s in function.statistics(A, B, spec.groups)]
    # Operations run with autograd's dispatch keys excluded. Including them again makes autograd record.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), autograd:
        maxima = [t.detach().requires_grad_() for t in _maxima(tile)]
        K = function.value(statistics, theta, *maxima)
    leaves = [*maxima, theta, *statistics]
    found = list(torch.autograd.grad(K, leaves, H, materialize_grads=True, allow_unused=True))
    if grads.smooth_max is not None:
        grads.smooth_max.add_(found.pop(0).flatten())
    grad_theta, *slopes = found
    grads.theta.add_(grad_theta)
    parts = (t.chunk(len(slopes), 1) for t in (A, B, grads.A, grads.B))
    for slope, statistic, a, b, grad_a, grad_b in zip(slopes, statistics, *parts, strict=True):
        if function.statistic == "dot":
            grad_b += slope @ a
            grad_a += slope.T @ b
        else:
            C = torch.where(statistic == 0, 0, slope / statistic)
            grad_b += C.sum(1, keepdim=True) * b - C @ a
            grad_a += C.sum(0).unsqueeze(1) * a - C.T @ b
