"""The record of an update that every operation below the checked functions takes, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snell.spec import Spec

__all__ = ["Gradients", "Parameters", "Update"]

#: A layer's ``A [n, r]``, ``B [m, r]``, ``theta [t]`` and what they make.
Parameters = tuple[Tensor, Tensor, Tensor, Spec]


class Update(NamedTuple):
    """``dW_ij = K_ij * gate(|K_ij|)`` with ``K_ij = kappa(B_i, A_j)``.

    A rectangle of an update is the update of sliced factors, so operations on blocks need no offsets.

    Attributes:
        A: ``[n, r]``.  B: ``[m, r]``.  theta: ``[t]``, the kernel function's scalar parameters.
        tau: 0-dim threshold. All four are float32 or all float64, on one device.
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
        """The update of other rows: those of ``B``."""
        return Update(self.A, B, self.theta, self.tau, self.spec)

    def with_columns(self, A: Tensor) -> Update:
        """The update of other columns: those of ``A``."""
        return Update(A, self.B, self.theta, self.tau, self.spec)

    def transposed(self) -> Update:
        """The update of dW^T: every pair statistic is symmetric, so its entries have the same bits."""
        return Update(self.B, self.A, self.theta, self.tau, self.spec)


class Gradients(NamedTuple):
    """What the gradients of an update's parameters are added to: contiguous tensors of their shapes and dtype."""

    A: Tensor
    B: Tensor
    theta: Tensor

    @classmethod
    def zeros(cls, update: Update) -> Gradients:
        """Zeros, contiguous however the factors themselves lie."""
        return cls(*(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in update[:3]))

    def with_columns(self, A: Tensor) -> Gradients:
        """The same, but for the columns whose gradient is ``A``."""
        return Gradients(A, self.B, self.theta)
