"""The figures of one layer of a saved adapter: a row of ``snell inspect``'s table and JSON."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from snell.cli.base_weights import BaseWeights
from snell.cli.survivors import share_in_densest_tenth, spread
from snell.update import Update


@dataclass(frozen=True)
class Row:
    """One layer's figures.

    Attributes:
        name: of the module in the base model.
        out_features, in_features, rank: m, n and r.
        sparsity_asked, sparsity_counted: shares of dW's entries that are zero.
        survivors: how many entries are not.
        tau: the threshold of \\|K\\|.
        norm, base_norm: Frobenius norms of dW and of W0; W0's is None without a base.
        ratio: ``norm / base_norm``.
        exceeds_base: whether ``norm > base_norm``; None without a base.
        densest_tenth_of_rows, densest_tenth_of_columns: share of the survivors in the tenth of the rows (columns) that
            has most of them; 0.1 would be uniform.
        untouched_rows, untouched_columns: share of the rows (columns) without a survivor.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    sparsity_asked: float
    sparsity_counted: float
    survivors: int
    tau: float
    norm: float
    base_norm: float | None
    ratio: float | None
    exceeds_base: bool | None
    densest_tenth_of_rows: float
    densest_tenth_of_columns: float
    untouched_rows: float
    untouched_columns: float


def measure(name: str, update: Update, base: BaseWeights | None) -> tuple[Row, Tensor]:
    """One layer's figures, and the share of entries that survive in each bin of a coarse grid over its matrix."""
    m, n = update.shape
    base_norm = base.norm(name, m, n) if base is not None else None
    found = spread(update)
    row = Row(
        name=name,
        out_features=m,
        in_features=n,
        rank=update.spec.rank,
        sparsity_asked=update.spec.sparsity,
        sparsity_counted=1 - found.count / (m * n),
        survivors=found.count,
        tau=update.tau.item(),
        norm=found.norm,
        base_norm=base_norm,
        ratio=found.norm / base_norm if base_norm else None,
        exceeds_base=None if base_norm is None else found.norm > base_norm,
        densest_tenth_of_rows=share_in_densest_tenth(found.by_row),
        densest_tenth_of_columns=share_in_densest_tenth(found.by_column),
        untouched_rows=(found.by_row == 0).double().mean().item(),
        untouched_columns=(found.by_column == 0).double().mean().item(),
    )
    return row, found.grid
