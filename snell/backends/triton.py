"""NVIDIA GPUs: the kernels of :mod:`snell.kernels`, launched on the tensors' device and current stream.

Float64 factors, which only gradient checks have, run on the blocked backend: the kernels decide
survivors in float32, and one layer must not mix the two.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snell import memo
from snell.backends import blocked
from snell.kernels import factor_grad as factor_grad_kernels
from snell.kernels import few_tokens, launch
from snell.kernels import merge as merge_kernels
from snell.kernels.selection import Update, forget, select_thresholds


def laid_out(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with contiguous columns, as the kernels read them."""
    return (A, B) if A.dtype == torch.float64 else (launch.k_major(A), launch.k_major(B))


def serves_few(x: Tensor, A: Tensor) -> bool:
    """Whether ``x [tokens, n]`` is for :func:`linear_few`, which never builds W0 + dW."""
    return x.shape[0] <= few_tokens.TOKENS and A.dtype == torch.float32 and x.dtype != torch.float64


linear_few = few_tokens.linear_few


class _Held(NamedTuple):
    """A threshold that :func:`hold_thresholds` selected, and what it holds for."""

    tensors: tuple[weakref.ref, ...]
    setting: tuple
    tau: Tensor


_held: dict[int, _Held] = {}

memo.also_clear += [forget, _held.clear]


def _setting(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> tuple:
    """What must not have changed for a held threshold to be handed out, in the same stream, captured or not."""
    versions = tuple(-1 if t.is_inference() else t._version for t in (A, B, theta))
    addresses = A.data_ptr(), B.data_ptr(), theta.data_ptr()
    place: tuple[int, bool] | None = None
    if A.is_cuda:
        place = torch.cuda.current_stream(A.device).cuda_stream, torch.cuda.is_current_stream_capturing()
    return versions, addresses, place, sparsity, kernel, groups


def hold_thresholds(parameters: Sequence[tuple[Tensor, Tensor, Tensor, float]], kernel: str, groups: int) -> None:
    """Select for all layers, given as A, B, theta and sparsity, in the same launches.

    tau is then handed out until a factor's version changes.
    The caller answers for changes that leave no trace on the host: see :func:`snell.refresh_thresholds`.
    """
    for key in [key for key, held in _held.items() if any(tensor() is None for tensor in held.tensors)]:
        del _held[key]
    updates = [Update(*layer) for layer in parameters]
    taus = select_thresholds(updates, kernel, groups)
    for update, layer, tau in zip(updates, parameters, taus, strict=True):
        tensors = tuple(weakref.ref(t) for t in update[:3])
        _held[id(update.A)] = _Held(tensors, _setting(*layer, kernel, groups), tau)


def select_threshold(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> Tensor:
    if A.dtype == torch.float64:
        return blocked.select_threshold(A, B, theta, sparsity, kernel, groups)
    if sparsity == 0.0:
        return A.new_zeros(())
    held = _held.get(id(A))
    if (
        held is not None
        and all(tensor() is t for tensor, t in zip(held.tensors, (A, B, theta), strict=True))
        and held.setting == _setting(A, B, theta, sparsity, kernel, groups)
    ):
        return held.tau.clone()
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
