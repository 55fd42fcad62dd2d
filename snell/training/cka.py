"""Linear CKA (centered kernel alignment), and how much an adapter changes a representation by it.

With the rows of X and Y = X + E centred by column, K = X X^T and L = Y Y^T = K + D, CKA is the cosine of K and L:
``<K, L> / (|K| |L|)``. An adapter changes little, so 1 - CKA is what matters, and subtracting the cosine from 1 would
cancel most digits. Here ``1 - cos = sin^2 / (1 + cos)``, and ``sin^2 = (|K|^2 |D|^2 - <K, D>^2) / (|K|^2 |L|^2)`` is
small because D is. E must come from the adapter's own branch: X + E in bfloat16 rounds a small E away.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cka_importance", "linear_cka"]

#: Rows of K and D that are held at a time: three tiles of 512 x 512, and nothing of the size of K or of a d x d Gram.
TILE = 512


@torch.no_grad()
def cka_importance(output: Tensor, change: Tensor) -> Tensor:
    """``1 - CKA(output, output + change)``: 0 if the change is none, near 1 if nothing of the output is left.

    Where CKA is not defined, because the output is constant over the rows or becomes so, the result is 0 if the change
    is constant too and 1 if not.

    Args:
        output: ``[N, d]``, what the layer gives without its adapter; rows are tokens or samples, at least two.
        change: ``[N, d]``, what the adapter adds.

    Returns:
        A 0-dim float64 tensor in [0, 1] on the inputs' device. Sums of products are float32, or float64 where the
        inputs are; sums of their squares are float64. Time is N^2 d, memory beyond the inputs three tiles and
        centred copies.

    Raises:
        ValueError: the shapes differ, are not two-dimensional, or have fewer than two rows.
    """
    if output.shape != change.shape or output.dim() != 2 or len(output) < 2:
        got = f"{tuple(output.shape)} and {tuple(change.shape)}"
        raise ValueError(f"output and change must be [N, d] alike, with at least two rows; got {got}")
    with torch.autocast(output.device.type, enabled=False):
        X, E = _centred(output), _centred(change)
        Y = X + E
        sums = X.new_zeros(3, dtype=torch.float64)
        starts = range(0, len(X), TILE)
        for i in starts:
            for j in (start for start in starts if start >= i):
                rows, columns = slice(i, i + TILE), slice(j, j + TILE)
                K = X[rows] @ X[columns].T
                D = torch.addmm(E[rows] @ Y[columns].T, X[rows], E[columns].T)
                products = [(a * b).sum(dtype=torch.float64) for a, b in ((K, K), (K, D), (D, D))]
                # Both matrices are symmetric: a tile off the diagonal counts twice.
                sums += (1 if i == j else 2) * torch.stack(products)
    KK, KD, DD = sums
    LL = (KK + 2 * KD + DD).clamp(min=0)
    sin2 = ((KK * DD - KD * KD) / (KK * LL)).clamp(0, 1)
    cos = ((KK + KD) / (KK * LL).sqrt()).clamp(0, 1)
    undefined = torch.where(DD == 0, 0.0, 1.0).to(sums)
    return torch.where((KK == 0) | (LL == 0), undefined, sin2 / (1 + cos))


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of two representations ``[N, d]`` of the same samples: a 0-dim float64 tensor in [0, 1].

    Raises:
        ValueError: as :func:`cka_importance`.

    Source: Kornblith et al. 2019, arXiv 1905.00414.
    """
    return 1 - cka_importance(x, y - x)


def _centred(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    # The mean of a constant column is exact in float64, so that the column becomes exactly 0.
    return x - x.mean(0, dtype=torch.float64).to(x.dtype)
