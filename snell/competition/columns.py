"""The smooth maximum of each column of K, by which a softmax over columns is known without any matrix.

``S_ij = exp((K_ij - L_j) / gamma)`` with ``L_j = gamma log sum_i exp(K_ij / gamma)``. K is that of the function under
the softmax (:attr:`snell.kernel_functions.KernelFunction.softmax_of`), which the backends write block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from snell import backends
from snell.backends.base import Backend
from snell.competition import memo
from snell.kernel_functions import guarded
from snell.kernel_functions import smooth_max as of_matrix
from snell.spec import Spec
from snell.update import Gradients, Update

__all__ = ["smooth_max", "smooth_max_backward"]

#: Most entries of a block of K. It stays in a CPU's cache between the passes over it.
BLOCK = 2**18


def smooth_max(A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Tensor:
    """The smooth maximum of each column, a new ``[n]`` of A's dtype. On a CPU it is remembered by the factors' content.

    Args:
        A, B, theta: ``[n, r]``, ``[m, r]`` and ``[t]``, already checked against ``spec``.
    """
    if A.device.type != "cpu":
        return _compute(A, B, theta, spec)
    A, B, theta = A.contiguous(), B.contiguous(), theta.contiguous()
    content = memo.fingerprint(A, B, theta), A.shape, B.shape, A.dtype, spec.kernel, spec.groups, backends.of(A).name
    return memo.remember_at((A.data_ptr(), B.data_ptr()), content, lambda: _compute(A, B, theta, spec))


@torch.no_grad()
def _compute(A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Tensor:
    if len(B) and (found := backends.of(A).smooth_max(A, B, theta, spec)) is not None:
        return found
    out = A.new_full((A.shape[0],), -torch.inf)
    for columns, _, _, K in _blocks(A, B, theta, spec):
        out[columns] = of_matrix(K, theta[-1])
    return out


@torch.no_grad()
def smooth_max_backward(
    grad: Tensor, maxima: Tensor, A: Tensor, B: Tensor, theta: Tensor, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, B and theta from ``grad [n]``, that of ``maxima [n]``.

    ``dK_ij = grad_j S_ij`` and ``dgamma = -sum_ij dK_ij log S_ij``. No entry is left out, so losers learn as well.
    """
    update, gamma = Update(A, B, theta, maxima, spec, smooth_max=maxima), guarded(theta[-1])
    grads = Gradients.zeros(update)
    if len(B) and backends.of(A).smooth_max_grad(grad, update, grads):
        return grads.A, grads.B, grads.theta
    constants = torch.zeros_like(theta[:-3])
    for columns, backend, part, K in _blocks(A, B, theta, spec):
        log_S = K.sub_(maxima[columns]).div_(gamma)
        G = log_S.exp().mul_(grad[columns])
        backend.factor_grad(G, part, Gradients(grads.A[columns], grads.B, constants))
        grads.theta[-1] -= log_S.mul_(G).sum()
    return grads.A, grads.B, grads.theta


def _blocks(A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Iterator[tuple[slice, Backend, Update, Tensor]]:
    """Blocks of columns: the slice, the backend, and the update and K of the function under the softmax."""
    assert spec.function.softmax_of is not None
    (n, m), backend = (A.shape[0], B.shape[0]), backends.of(A)
    if not m:  # a process may have no piece
        return
    under = Spec(spec.rank, 0.0, spec.function.softmax_of, spec.groups).applied
    update = backend.prepare(Update(A, B, theta[:-3].contiguous(), A.new_zeros(()), under))
    width = max(BLOCK // m, 1)
    room = A.new_empty(m * min(width, n))
    for first in range(0, n, width):
        columns = slice(first, min(first + width, n))
        part = update.columns(columns)
        K = room[: m * part.A.shape[0]].view(part.shape)
        backend.merge(part, None, K)
        yield columns, backend, part, K
