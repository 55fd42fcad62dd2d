"""The update as a layer holds it: how it starts, and how it goes into a weight and out again bit for bit.

Dense blocks come from :func:`snell.functional.merge`; a block of rows is held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from snell import functional
from snell.schedule import block_length
from snell.spec import KERNEL_FUNCTIONS, Spec

__all__ = ["Merged", "Update", "draw", "draw_identity", "merge_into"]


class Update(NamedTuple):
    """The factors ``A [n, r]``, ``B [m, r]``, ``theta [t]``, their threshold and what they are made of."""

    A: Tensor
    B: Tensor
    theta: Tensor
    tau: Tensor
    spec: Spec

    def rows(self, rows: slice | None = None, weight: Tensor | None = None) -> Tensor:
        """Those rows of dW, or of ``weight + dW`` where the same rows of a weight are given."""
        A, B, theta, tau, spec = self
        B = B if rows is None else B[rows]
        return functional.merge(
            A, B, theta, tau, weight=weight, kernel=spec.kernel, groups=spec.groups, gate=spec.effective_gate
        )

    def row_blocks(self) -> Iterator[slice]:
        """The rows that are built at a time."""
        m = self.B.shape[0]
        length = block_length(self.A.shape[0] * self.A.element_size(), m)
        return (slice(start, min(start + length, m)) for start in range(0, m, length))

    def clone(self) -> Update:
        """A copy that later training steps leave alone."""
        A, B, theta, tau = (t.detach().clone() for t in self[:4])
        return Update(A, B, theta, tau, self.spec)


class Merged(NamedTuple):
    """What takes a merged update out again: the update as merged, and the weights it replaced."""

    update: Update
    replaced: list[Tensor]

    @torch.no_grad()
    def take_out(self, weight: Tensor) -> None:
        """Put the replaced entries of ``weight [m, n]`` back, in place; survivors are found again from the update."""
        for rows, replaced in zip(self.update.row_blocks(), self.replaced, strict=True):
            weight[rows][self.update.rows(rows) != 0] = replaced


@torch.no_grad()
def merge_into(weight: Tensor, update: Update) -> Merged:
    """Add dW into ``weight [m, n]`` in place, and return what undoes it: (1 - s) * m * n numbers and the factors."""
    update, replaced = update.clone(), []
    for rows in update.row_blocks():
        base = weight[rows]
        replaced.append(base[update.rows(rows) != 0])
        base.copy_(update.rows(rows, base))
    return Merged(update, replaced)


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
    if spec.sparsity or KERNEL_FUNCTIONS[spec.kernel].statistic != "dot":
        raise ValueError(
            "an identity start that still trains exists for sparsity=0 and the kernel functions linear and sigmoid "
            f"alone; got sparsity={spec.sparsity}, kernel={spec.kernel!r}. The published start is small, but not 0"
        )
    draw(A, B, theta, spec, scale)
    B.zero_()
