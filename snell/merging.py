"""How an update goes into a weight and out again bit for bit, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from snell.blocks import block_length
from snell.functional import dense
from snell.update import Update

__all__ = ["Merged", "row_blocks"]


def row_blocks(update: Update) -> Iterator[slice]:
    """The rows of dW that are built at a time."""
    m, n = update.shape
    length = block_length(n * update.A.element_size(), m)
    return (slice(start, min(start + length, m)) for start in range(0, m, length))


class Merged(NamedTuple):
    """What takes an update out of a weight: a copy of the update, and the entries it has replaced so far.

    Each block is recorded before it is written, and taking it out writes the same bits however often it is done. So
    whoever holds the record can undo :meth:`put_in` and finish :meth:`take_out` wherever an interrupt stopped them.
    """

    update: Update
    replaced: list[Tensor]

    @classmethod
    def of(cls, update: Update) -> Merged:
        """The record of an update that is in no weight yet. It keeps copies, which later training steps leave alone."""
        A, B, theta, tau = (t.detach().clone() for t in update[:4])
        return cls(Update(A, B, theta, tau, update.spec), [])

    @torch.no_grad()
    def put_in(self, weight: Tensor) -> None:
        """Add dW into ``weight [m, n]`` in place; the record then holds (1 - s) * m * n replaced entries."""
        for rows in row_blocks(self.update):
            base = weight[rows]
            self.replaced.append(base[dense(self.update, rows) != 0])
            base.copy_(dense(self.update, rows, base))

    @torch.no_grad()
    def take_out(self, weight: Tensor) -> None:
        """Put the replaced entries of ``weight [m, n]`` back, in place; survivors are found again from the update."""
        for rows, replaced in zip(row_blocks(self.update), self.replaced, strict=False):
            weight[rows][dense(self.update, rows) != 0] = replaced
