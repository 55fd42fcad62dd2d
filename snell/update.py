"""The update as every operation below :mod:`snell.functional` takes it, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snell.spec import Spec

__all__ = ["Activations", "Gradients", "Parameters", "Update"]

#: A layer's ``A [n, r]``, ``B [m, r]`` and ``theta [t]``, and the settings of its update.
Parameters = tuple[Tensor, Tensor, Tensor, Spec]


class Update(NamedTuple):
    """``dW_ij = K_ij * gate(|K_ij|)`` with ``K_ij = kappa(B_i, A_j)``.

    A rectangle of an update is the update of sliced factors. Operations on blocks therefore need no offsets.

    Attributes:
        A: ``[n, r]``.  B: ``[m, r]``.  theta: ``[t]``, the kernel function's scalar parameters.
        tau: 0-dim threshold. All four have one dtype, float32 or float64, and one device.
        spec: kernel function, groups and the gate that applies (:attr:`snell.spec.Spec.applied`).
    """

    A: Tensor
    B: Tensor
    theta: Tensor
    tau: Tensor
    spec: Spec

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of dW."""
        return self.B.shape[0], self.A.shape[0]

    def with_rows(self, B: Tensor) -> Update:
        """The update with other rows, given by ``B``."""
        return Update(self.A, B, self.theta, self.tau, self.spec)

    def with_columns(self, A: Tensor) -> Update:
        """The update with other columns, given by ``A``."""
        return Update(A, self.B, self.theta, self.tau, self.spec)

    def transposed(self) -> Update:
        """The update of dW^T. Every pair statistic is symmetric, so its entries have the same bits."""
        return Update(self.B, self.A, self.theta, self.tau, self.spec)


class Gradients(NamedTuple):
    """Accumulators for the gradients of an update's parameters: contiguous, of the same shapes and dtype."""

    A: Tensor
    B: Tensor
    theta: Tensor

    @classmethod
    def zeros(cls, update: Update) -> Gradients:
        """Zeros, contiguous whatever the factors' own layout."""
        A, B, theta, _, _ = update
        layout = torch.contiguous_format
        return cls(
            torch.zeros_like(A, memory_format=layout),
            torch.zeros_like(B, memory_format=layout),
            torch.zeros_like(theta, memory_format=layout),
        )

    def with_columns(self, A: Tensor) -> Gradients:
        """The same with A's gradient replaced by ``A``, that of a block of columns."""
        return Gradients(A, self.B, self.theta)


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
