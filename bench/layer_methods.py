"""The contenders of the layer benchmark: each a forward of one frozen m x n layer with something to train.

``floor`` is no method: the three products that any method with a nonlinear merge must do, by plain matmul.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from snell import SnellLinear, memo
from snell.bench.footprint import num_trained, optimizer_bytes, start, trained
from snell.bench.methods import GROUPS, METHODS, RANK, SCALE, SPARSITY


@dataclass(frozen=True)
class Case:
    """One layer and one batch of activations."""

    in_features: int
    out_features: int
    tokens: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.in_features} x {self.out_features}, {self.tokens}"


class _OneLayer(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear


def _adapted(method: str, linear: nn.Linear) -> nn.Module:
    if method == "snell":  # the drop-in layer itself; through PEFT it stands in bench.models
        return SnellLinear.from_linear(linear, rank=RANK, sparsity=SPARSITY, groups=GROUPS, scale=SCALE)
    model = METHODS[method].adapt(_OneLayer(linear), RANK)
    # The layer alone: a model's own wrapper is no part of what is measured.
    return (model.get_base_model() if isinstance(model, PeftModel) else model).linear


class Contender:
    """One method on one case: ``step()`` is a forward and a backward of new parameters, gradients dropped after."""

    def __init__(self, method: str, case: Case, x: Tensor, grad_y: Tensor) -> None:
        options = {"device": case.device, "dtype": case.dtype}
        self.x, self.grad_y = x, grad_y
        self.layer = _adapted(method, nn.Linear(case.in_features, case.out_features, **options))
        self.inputs = (x, *trained(self.layer))

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def step(self) -> None:
        memo.clear()  # a training step's factors are new, so its threshold is selected anew
        torch.autograd.grad(self.forward(), self.inputs, self.grad_y)

    def trains(self) -> dict[str, int]:
        """How many numbers are trained, and the bytes of AdamW's state for them after a step."""
        state = optimizer_bytes(start(torch.optim.AdamW(trained(self.layer), lr=0.0)))
        self.layer.zero_grad()
        return {"trainable": num_trained(self.layer), "optimizer_bytes": state}


class Floor:
    """x W^T, dY W and dY^T X of the case, results dropped after."""

    def __init__(self, case: Case, x: Tensor, grad_y: Tensor) -> None:
        self.x, self.grad_y = x.detach(), grad_y
        self.weight = torch.randn(case.out_features, case.in_features, device=case.device, dtype=case.dtype)

    def step(self) -> None:
        _ = self.x @ self.weight.T, self.grad_y @ self.weight, self.grad_y.T @ self.x
