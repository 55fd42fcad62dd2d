"""How an update starts: its factors drawn as published, or so that dW is exactly 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from snell.spec import Spec

__all__ = ["draw", "draw_identity"]


@torch.no_grad()
def draw(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, scale: float) -> None:
    """Fill the factors as published: uniform in +-1/sqrt(n*r/P) and +-1/sqrt(m*r/P)."""
    for factor in (A, B):
        nn.init.uniform_(factor, -1, 1).div_(math.sqrt(factor.numel() / spec.groups))
    theta.copy_(torch.tensor(spec.initial_theta(scale)))


@torch.no_grad()
def draw_identity(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, scale: float) -> None:
    """Fill the factors so that dW is exactly 0 and has a gradient: LoRA's start.

    It exists without competition only. With it, an entry of dW is 0 where its gate is, and the gradient
    carries that same gate: an update of exactly 0 would never move. Distances have no such start either:
    where they are 0 their gradient is, and equal groups of opposite sign cancel to rounding only.

    Raises:
        ValueError: ``sparsity > 0``, or a kernel function of distances.
    """
    if spec.sparsity or spec.function.statistic != "dot":
        raise ValueError(
            "an identity start that still trains exists for sparsity=0 and the kernel functions linear and sigmoid "
            f"alone; got sparsity={spec.sparsity}, kernel={spec.kernel!r}. The published start is small, but not 0"
        )
    draw(A, B, theta, spec, scale)
    B.zero_()
