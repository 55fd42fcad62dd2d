"""What masks weigh the adapters of a bank with, and the weighted sum of their factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["chosen", "mix", "weights"]

#: Bytes of the bank's rows that are gathered or converted at a time, so that they stay in a cache.
CHUNK_BYTES = 2**21


def chosen(logits: Tensor, k: int) -> Tensor:
    """``[..., N]`` bool: the k largest of the last axis; of equal ones those of the lowest index."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, True)


class _StraightThrough(torch.autograd.Function):
    """The second argument's values with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def weights(logits: Tensor, k: int | None, mean: bool) -> Tensor:
    """``[P, N]`` weights from as many logits: their softmax, or 1 (or 1 / k) for the k largest and 0 for the rest.

    The gradient is the softmax's either way.
    """
    soft = torch.softmax(logits, -1)
    if k is None:
        return soft
    hard = chosen(logits.detach(), k).to(soft.dtype)
    return _StraightThrough.apply(soft, hard / k if mean else hard)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, bank: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(bank)
        ctx.dtype = weights.dtype
        flat = bank.flatten(1)
        out = weights.new_zeros(len(weights), flat.shape[1])
        used = weights.any(0).nonzero().squeeze(1) if sparse else None
        for rows, of in _chunks(flat, weights.dtype, used):
            out.addmm_(weights[:, of], rows)
        return out.view(len(weights), *bank.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bank,) = ctx.saved_tensors
        grad, found = grad.flatten(1), grad.new_empty(len(grad), len(bank))
        # Adapters that are not chosen get a gradient too, or none could ever be chosen in their place.
        for rows, of in _chunks(bank.flatten(1), ctx.dtype, None):
            found[:, of] = grad @ rows.t()
        return found, None, None


def _chunks(flat: Tensor, dtype: torch.dtype, used: Tensor | None):
    """Rows of the bank in ``dtype``, some at a time, and which they are."""
    length = max(CHUNK_BYTES // (flat.shape[1] * dtype.itemsize), 1)
    if used is not None:
        for of in used.split(length):
            yield flat[of].to(dtype), of
        return
    if flat.dtype == dtype:
        length = len(flat)
    for first in range(0, len(flat), length):
        of = slice(first, first + length)
        yield flat[of].to(dtype), of


def mix(weights: Tensor, bank: Tensor, sparse: bool = False) -> Tensor:
    """The weighted sums ``[P, d, r]`` of a constant bank ``[N, d, r]``, by ``weights [P, N]``, in their dtype.

    Args:
        sparse: whether most weights are 0: adapters that no profile uses are then not read in forward.
    """
    return _Mix.apply(weights, bank, sparse)
