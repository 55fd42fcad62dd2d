"""The update as every operation below :mod:`snell.functional` takes it, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from snell.spec import Spec

__all__ = ["Activations", "Gradients", "Parameters", "Update"]

#: A layer's ``A [n, r]``, ``B [m, r]`` and ``theta [t]``, and the settings of its update.
Parameters = tuple[Tensor, Tensor, Tensor, Spec]


class Update(NamedTuple):
    """``dW_ij = K_ij * gate(|K_ij|)`` with ``K_ij = kappa(B_i, A_j)``, less the same of ``start`` if there is one.

    A rectangle of an update is the update of sliced factors. Operations on blocks therefore need no offsets.

    Attributes:
        A: ``[n, r]``.  B: ``[m, r]``.  theta: ``[t]``, the kernel function's scalar parameters.
        tau: 0-dim threshold. All four have one dtype, float32 or float64, and one device.
        spec: kernel function, groups and the gate that applies (:attr:`snell.spec.Spec.applied`).
        start: a constant update of the same shape and spec, subtracted from this one. It has no start of its own.
        smooth_max: ``[n]``, the smooth maximum of each column of the whole K, if the kernel function has a softmax.
        of_rows: whether ``smooth_max [m]`` belongs to the rows, as in a transposed update.
        halves: what the backend computes K from in place of A and B, if anything: a row for each of theirs, and more.
    """

    A: Tensor
    B: Tensor
    theta: Tensor
    tau: Tensor
    spec: Spec
    start: Update | None = None
    smooth_max: Tensor | None = None
    of_rows: bool = False
    halves: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of dW."""
        return self.B.shape[0], self.A.shape[0]

    def rows(self, rows: slice) -> Update:
        """The update of these rows of dW."""
        start = None if self.start is None else self.start.rows(rows)
        halves = None if self.halves is None else (self.halves[0], self.halves[1][rows], self.halves[2])
        return self._replace(B=self.B[rows], start=start, smooth_max=self._cut(rows, self.of_rows), halves=halves)

    def columns(self, columns: slice | Tensor) -> Update:
        """The update of these columns of dW: a slice of them, or their indices."""
        start = None if self.start is None else self.start.columns(columns)
        halves = None if self.halves is None else (self.halves[0][columns], *self.halves[1:])
        return self._replace(
            A=self.A[columns], start=start, smooth_max=self._cut(columns, not self.of_rows), halves=halves
        )

    def _cut(self, lines: slice | Tensor, cuts: bool) -> Tensor | None:
        return self.smooth_max[lines] if cuts and self.smooth_max is not None else self.smooth_max

    def split(self, lengths: int | Sequence[int], dim: int) -> Iterator[Update]:
        """The updates of so many rows (dim 0) or columns (dim 1) at a time, as ``Tensor.split`` cuts dW."""
        cut, lines = self.columns if dim else self.rows, self.shape[dim]
        if isinstance(lengths, int):
            lengths = [lengths] * -(-lines // lengths)
        return (cut(slice(end - length, end)) for length, end in zip(lengths, accumulate(lengths), strict=True))

    def transposed(self) -> Update:
        """The update of dW^T. Every pair statistic is symmetric, so its entries have the same bits."""
        start = None if self.start is None else self.start.transposed()
        return self._replace(A=self.B, B=self.A, start=start, of_rows=not self.of_rows, halves=None)


class Gradients(NamedTuple):
    """Accumulators for the gradients of an update's parameters: contiguous, of the same shapes and dtype.

    That of ``smooth_max`` is there if the update has one.
    """

    A: Tensor
    B: Tensor
    theta: Tensor
    smooth_max: Tensor | None = None

    @classmethod
    def zeros(cls, update: Update) -> Gradients:
        """Zeros, contiguous whatever the factors' own layout."""
        A, B, theta = update[:3]
        layout = torch.contiguous_format
        return cls(
            torch.zeros_like(A, memory_format=layout),
            torch.zeros_like(B, memory_format=layout),
            torch.zeros_like(theta, memory_format=layout),
            None if update.smooth_max is None else torch.zeros_like(update.smooth_max, memory_format=layout),
        )

    def with_columns(self, A: Tensor, smooth_max: Tensor | None) -> Gradients:
        """The same with A's gradient and smooth_max's replaced by those of a block of columns."""
        return Gradients(A, self.B, self.theta, smooth_max)


class Activations(NamedTuple):
    """What G is the product of, transposed: ``G_ij = grad_y_i . x_j``. Contiguous, of the factors' dtype.

    Attributes:
        grad_y: ``[m, T]``.  x: ``[n, T]``. A backend may pad T with zeros.
    """

    grad_y: Tensor
    x: Tensor

    def with_columns(self, x: Tensor) -> Activations:
        """Those of a block of G's columns, given by ``x``."""
        return Activations(self.grad_y, x)

    def t(self) -> Activations:
        """Those of G^T."""
        return Activations(self.x, self.grad_y)

    def product(self) -> Tensor:
        """G."""
        return self.grad_y @ self.x.t()
