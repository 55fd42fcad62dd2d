"""tau of one layer: remembered, or selected by the backend of its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from snell import backends
from snell.backends.base import Backend
from snell.blocks import block_length
from snell.competition import columns, memo, radix
from snell.competition.held import held
from snell.spec import Spec
from snell.update import Update

__all__ = ["count", "select"]


def select(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, smooth_max: Tensor | None = None) -> Tensor:
    """The ceil(s*m*n)-th smallest \\|K\\|, a new 0-dim tensor of A's dtype; 0 if the sparsity is 0.

    Args:
        A, B, theta: ``[n, r]``, ``[m, r]`` and ``[t]``, already checked against ``spec``.
        smooth_max: ``[n]``, that of these factors, if the kernel function has a softmax and the caller has it already.
    """
    if spec.sparsity == 0.0:
        return A.new_zeros(())
    backend, k = backends.of(A), spec.num_zeroed(A.shape[0] * B.shape[0])
    if backend.remembers:
        tau = held(backend, A, B, theta, spec)
        return _select(backend, A, B, theta, spec, k, smooth_max) if tau is None else tau
    if A.device.type != "cpu":
        return _select(backend, A, B, theta, spec, k, smooth_max)
    A, B, theta = A.contiguous(), B.contiguous(), theta.contiguous()
    parameters = memo.fingerprint(A, B, theta), A.shape, B.shape, A.dtype
    key = (*parameters, backend.name, k, spec.kernel, spec.groups)
    return memo.remember(key, lambda: _select(backend, A, B, theta, spec, k, smooth_max))


def _select(
    backend: Backend, A: Tensor, B: Tensor, theta: Tensor, spec: Spec, k: int, smooth_max: Tensor | None
) -> Tensor:
    if smooth_max is None and spec.function.softmax_of is not None:
        smooth_max = columns.smooth_max(A, B, theta, spec)
    tau = backend.select(A, B, theta, spec, k, smooth_max)
    return count(backend, A, B, theta, spec, k, smooth_max) if tau is None else tau


@torch.no_grad()
def count(
    backend: Backend,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    spec: Spec,
    k: int,
    smooth_max: Tensor | None = None,
    add: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor:
    """The k-th smallest \\|K\\| by counting over blocks of rows of K, which the backend writes as an ungated update.

    Args:
        add: adds the counts of the other pieces of the matrix.
    """
    n, m = A.shape[0], B.shape[0]
    rows = block_length(n * A.element_size(), m)
    out = A.new_empty(rows, n)
    ungated = Spec(spec.rank, 0.0, spec.kernel, spec.groups).applied
    update = backend.prepare(Update(A, B, theta, A.new_zeros(()), ungated, smooth_max=smooth_max))

    def tiles() -> Iterator[Tensor]:
        for block in update.split(rows, 0):
            tile = out[: block.B.shape[0]]
            backend.merge(block, None, tile)
            yield tile

    return radix.smallest(k, tiles, A, add)
