"""Kernels read and write contiguous rows. A column-major matrix is passed to them as its transpose."""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_transposed", "readable", "row_major"]


def _has_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] == 1


def _has_columns(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 or matrix.shape[0] == 1


def readable(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows or columns; copied if it has neither."""
    return matrix if _has_rows(matrix) or _has_columns(matrix) else matrix.contiguous()


def is_transposed(lead: Tensor) -> bool:
    """Whether to transpose the problem, so that ``lead``, which may be written to, has contiguous rows.

    Raises:
        ValueError: ``lead`` has neither contiguous rows nor contiguous columns.
    """
    if _has_rows(lead):
        return False
    if not _has_columns(lead):
        raise ValueError(f"the matrix to write needs contiguous rows or columns; its strides are {lead.stride()}")
    return True


def row_major(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows and any stride between them; copied where it has none."""
    return matrix if _has_rows(matrix) else matrix.contiguous()
