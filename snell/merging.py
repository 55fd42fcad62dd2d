"""Adds an update to a weight and removes it again bit for bit, block by block."""

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
    """The blocks of rows of dW that are computed at a time."""
    m, n = update.shape
    length = block_length(n * update.A.element_size(), m)
    return (slice(start, min(start + length, m)) for start in range(0, m, length))


class Merged(NamedTuple):
    """The record that removes an update from a weight: a copy of the update, and the entries replaced so far.

    A block is recorded before it is written, and :meth:`take_out` can be repeated. Whoever holds the record can
    therefore undo :meth:`put_in` and finish :meth:`take_out` wherever an interrupt stopped them.
    """

    update: Update
    replaced: list[Tensor]
    scale: float = 1.0

    @classmethod
    def of(cls, update: Update, scale: float = 1.0) -> Merged:
        """The record of an update that is not in a weight yet. It has copies, which training does not change."""
        A, B, theta, tau = (t.detach().clone() for t in update[:4])
        maxima = None if update.smooth_max is None else update.smooth_max.detach().clone()
        return cls(update._replace(A=A, B=B, theta=theta, tau=tau, smooth_max=maxima), [], scale)

    @torch.no_grad()
    def put_in(self, weight: Tensor) -> None:
        """Add scale * dW to ``weight [m, n]`` in place. The record then holds the entries that dW replaced.

        The weight may have more axes than two; those after the first are dW's columns.
        """
        for rows in row_blocks(self.update):
            base = weight[rows]
            self.replaced.append(base[dense(self.update, rows).view(base.shape) != 0])
            base.copy_(dense(self.update, rows, base.flatten(1), self.scale).view(base.shape))

    @torch.no_grad()
    def take_out(self, weight: Tensor) -> None:
        """Restore the replaced entries of ``weight [m, n]`` in place. The update gives their positions."""
        for rows, replaced in zip(row_blocks(self.update), self.replaced, strict=False):
            base = weight[rows]
            base[dense(self.update, rows).view(base.shape) != 0] = replaced
