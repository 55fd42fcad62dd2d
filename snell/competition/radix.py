"""Exact selection by counting: radix select on the bits of magnitudes, which sort like the floats.

Each pass counts one digit of the entries that match the digits found so far. Counts and results stay on the device, and
counts of several processes can be added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["smallest"]

#: Bits of a magnitude that one pass finds.
DIGIT_BITS = 11


def _identity(counts: Tensor) -> Tensor:
    return counts


def smallest(
    k: int, tiles: Callable[[], Iterable[Tensor]], like: Tensor, add: Callable[[Tensor], Tensor] = _identity
) -> Tensor:
    """The k-th smallest magnitude (k from 1) of the entries of all tiles; 0 for k = 0.

    Args:
        k: rank of the magnitude.
        tiles: called once per pass; yields the matrix in pieces, in ``like``'s dtype and on its device.
        like: float32 or float64.
        add: adds the counts of the other processes that have pieces of the matrix.

    Returns:
        A 0-dim tensor like ``like``. NaN counts as larger than infinity.
    """
    bits = torch.int32 if like.dtype == torch.float32 else torch.int64
    width = 31 if bits is torch.int32 else 63
    remaining = torch.full((), k, device=like.device)
    prefix = torch.zeros((), dtype=bits, device=like.device)
    for top in range(width, 0, -DIGIT_BITS):
        shift = max(top - DIGIT_BITS, 0)
        digits = 1 << (top - shift)
        counts = torch.zeros(digits + 1, dtype=torch.int64, device=like.device)
        for tile in tiles():
            keys = tile.abs().view(bits)
            match = (keys >> (top - 1) >> 1) == prefix
            digit = torch.where(match, keys >> shift & (digits - 1), digits).flatten()
            counts.scatter_add_(0, digit.long(), torch.ones_like(digit, dtype=torch.int64))
        cumulative = add(counts)[:digits].cumsum(0)
        chosen = (cumulative < remaining).sum()
        remaining = remaining - torch.where(chosen > 0, cumulative[(chosen - 1).clamp(min=0)], 0)
        prefix = (prefix << (top - shift)) | chosen.to(bits)
    return prefix.view(like.dtype)
