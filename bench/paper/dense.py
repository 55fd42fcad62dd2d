"""The competition among the entries of a matrix that is trainable as it is: what SNELL's factors save the memory of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snell import reference
from snell.spec import num_zeroed

#: Standard deviation of the matrix at the start. It cannot be 0: entries that tie with the threshold lose.
START = 1e-3


class DenseUpdate(nn.Module):
    """A frozen linear layer plus a trainable matrix dW of its size, whose largest entries survive (the hard gate).

    Args:
        linear: the layer; its weight ``[m, n]`` and bias are shared and frozen.
        sparsity: share of dW's entries that are zero, in [0, 1).
        straight_through: whether losers get the gradient of their entry too, as if they had survived. Otherwise the
            gate counts as a constant, as in SNELL; but where factors are shared by a row, losers here never move.
    """

    def __init__(self, linear: nn.Linear, *, sparsity: float, straight_through: bool = False) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.sparsity, self.straight_through = sparsity, straight_through
        self.update = nn.Parameter(START * torch.randn_like(linear.weight))

    def delta_weight(self) -> Tensor:
        """Dense dW ``[m, n]``, losers zero."""
        losers = num_zeroed(self.sparsity, self.update.numel())
        if not losers:
            return self.update
        tau = self.update.detach().abs().flatten().kthvalue(losers).values
        survivors = self.update * reference.gate_values(self.update, tau, gate="hard")
        return self.update + (survivors - self.update).detach() if self.straight_through else survivors

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n] -> [..., m]``."""
        return nn.functional.linear(x, self.weight + self.delta_weight(), self.bias)
