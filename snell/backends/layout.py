"""Kernels read and write rows. A matrix stored by columns is handed to them as its transpose.

Every pair statistic is symmetric in its arguments, so the transpose of an update is the update with A and
B exchanged, entry for entry and bit for bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _has_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] == 1


def _has_columns(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 or matrix.shape[0] == 1


def readable(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows or columns, copied where it has neither."""
    return matrix if _has_rows(matrix) or _has_columns(matrix) else matrix.contiguous()


def row_major(
    factors: tuple[Tensor, ...], lead: Tensor, *matrices: Tensor | None
) -> tuple[tuple[Tensor, ...], list[Any]]:
    """The problem as kernels take it: matrices with contiguous rows and any stride between them.

    Args:
        factors: alternately of columns and rows: ``(A, B)`` or ``(A, B, grad_A, grad_B)``.
        lead: the matrix ``[m, n]`` whose layout decides, with contiguous rows or columns; the one that is written to,
            where there is one.
        matrices: further ``[m, n]`` matrices or None. Those laid out otherwise are copied.

    Returns:
        The factors, exchanged pair by pair where ``lead`` is stored by columns, and all matrices, lead first.

    Raises:
        ValueError: ``lead`` has neither contiguous rows nor contiguous columns.
    """
    if _has_rows(lead) and all(m is None or _has_rows(m) for m in matrices):
        return factors, [lead, *matrices]
    everything: tuple[Tensor | None, ...] = (lead, *matrices)
    if not _has_rows(lead):
        if not _has_columns(lead):
            raise ValueError(f"the matrix to write needs contiguous rows or columns; its strides are {lead.stride()}")
        factors = tuple(factor for i in range(0, len(factors), 2) for factor in (factors[i + 1], factors[i]))
        everything = tuple(None if matrix is None else matrix.t() for matrix in everything)
    return factors, [m if m is None or _has_rows(m) else m.contiguous() for m in everything]
