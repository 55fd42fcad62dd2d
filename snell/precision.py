"""The dtypes of factors: float32 whatever the weight's, or float64 with it, because they decide who survives."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HALVES", "factor_dtype", "full", "keep_precision"]

HALVES = (torch.bfloat16, torch.float16)


def factor_dtype(weight: torch.dtype | None) -> torch.dtype:
    """The dtype of the factors beside a weight of that dtype."""
    return torch.float64 if weight == torch.float64 else torch.float32


def full(factor: Tensor) -> Tensor:
    """A factor that was rounded to half precision, widened: everything after that is computed in float32."""
    return factor.float() if factor.dtype in HALVES else factor


def keep_precision(before: Tensor, after: Tensor) -> Tensor:
    """What ``.to(dtype)`` makes of a factor: where it would round it to half precision, only its device follows."""
    if after.dtype in HALVES and before.dtype not in HALVES:
        return before.to(after.device)
    return after
