"""How an update goes into a weight and out again bit for bit, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from snell.blocks import block_length
from snell.functional import dense
from snell.update import Update

__all__ = ["Merged", "merge_into", "row_blocks"]


def row_blocks(update: Update) -> Iterator[slice]:
    """The rows of dW that are built at a time."""
    m, n = update.shape
    length = block_length(n * update.A.element_size(), m)
    return (slice(start, min(start + length, m)) for start in range(0, m, length))


class Merged(NamedTuple):
    """What takes a merged update out again: the update as merged, and the weights it replaced."""

    update: Update
    replaced: list[Tensor]

    @torch.no_grad()
    def take_out(self, weight: Tensor) -> None:
        """Put the replaced entries of ``weight [m, n]`` back, in place; survivors are found again from the update."""
        for rows, replaced in zip(row_blocks(self.update), self.replaced, strict=True):
            weight[rows][dense(self.update, rows) != 0] = replaced


@torch.no_grad()
def merge_into(weight: Tensor, update: Update) -> Merged:
    """Add dW into ``weight [m, n]`` in place, and return what undoes it: (1 - s) * m * n numbers and the factors."""
    # A copy, which later training steps leave alone.
    A, B, theta, tau = (t.detach().clone() for t in update[:4])
    update, replaced = Update(A, B, theta, tau, update.spec), []
    for rows in row_blocks(update):
        base = weight[rows]
        replaced.append(base[dense(update, rows) != 0])
        base.copy_(dense(update, rows, base))
    return Merged(update, replaced)
