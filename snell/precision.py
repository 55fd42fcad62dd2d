"""The dtype of factors: float64 for a float64 weight, else float32. Rounding would change which entries are kept."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HALVES", "factor_dtype", "full", "keep_precision"]

HALVES = (torch.bfloat16, torch.float16)


def factor_dtype(weight: torch.dtype | None) -> torch.dtype:
    """The dtype of the factors for a weight of that dtype."""
    return torch.float64 if weight == torch.float64 else torch.float32


def full(factor: Tensor) -> Tensor:
    """The factor, converted to float32 if it is in half precision. All computation is in float32 or float64."""
    return factor.float() if factor.dtype in HALVES else factor


def keep_precision(before: Tensor, after: Tensor) -> Tensor:
    """The result of a factor's ``.to(dtype)``. If that would round it to half precision, only the device changes."""
    if after.dtype in HALVES and before.dtype not in HALVES:
        return before.to(after.device)
    return after
