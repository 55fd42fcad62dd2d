"""Where a layer's survivors lie: counts by row, by column and over a coarse grid, from dW a block of rows at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from snell.functional import dense
from snell.merging import row_blocks
from snell.update import Update

#: The most bins of the grid along a side of the matrix.
BINS = 64


@dataclass(frozen=True)
class Spread:
    """One layer's survivors.

    Attributes:
        by_row: ``[m]`` and by_column: ``[n]`` counts.
        grid: ``[bins, bins]`` share of the entries of each bin that survive.
        norm: Frobenius norm of dW.
    """

    by_row: Tensor
    by_column: Tensor
    grid: Tensor
    norm: float

    @property
    def count(self) -> int:
        return int(self.by_row.sum())


def _bins(size: int) -> Tensor:
    """The bin of each row or column. Bins have one size, but for the last: unequal ones would draw stripes."""
    return torch.arange(size) // -(-size // BINS)


@torch.no_grad()
def spread(update: Update) -> Spread:
    """Count the survivors; at any time one block of rows and the counts are held."""
    m, n = update.shape
    rows, columns = _bins(m), _bins(n)
    by_row, by_column = torch.zeros(m, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    grid = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1, dtype=torch.int64)
    squares = 0.0
    for block in row_blocks(update):
        delta = dense(update, block)
        squares += torch.linalg.vector_norm(delta, dtype=torch.float64).square().item()
        survives = (delta != 0).long()
        by_row[block], by_column = survives.sum(1), by_column + survives.sum(0)
        in_bins = torch.zeros(survives.shape[0], grid.shape[1], dtype=torch.int64).index_add_(1, columns, survives)
        grid.index_add_(0, rows[block], in_bins)
    area = rows.bincount().unsqueeze(1) * columns.bincount()
    return Spread(by_row, by_column, grid / area, math.sqrt(squares))


def share_in_densest_tenth(counts: Tensor) -> float:
    """The share of all survivors in the tenth of the rows (or columns) that has most of them; 0.1 would be uniform."""
    most, tenth = counts.sort(descending=True).values.double(), len(counts) / 10
    whole = int(tenth)
    held = most[:whole].sum() + (tenth - whole) * most[whole]
    return (held / most.sum().clamp(min=1)).item()
