"""The contenders of the layer benchmark: each a forward of one frozen m x n layer with something to train.

``floor`` is no method: the three products that any method with a nonlinear merge must do, by plain matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell import SnellLinear, memo

RANK, SPARSITY, GROUPS, SCALE = 32, 0.9, 2, 0.1


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


class Published(nn.Module):
    """The published algorithm, written plainly: cdist, quantile, float(threshold), merge under checkpointing."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        options = {"device": base.weight.device}
        self.A = nn.Parameter(torch.empty(base.in_features, RANK, **options))
        self.B = nn.Parameter(torch.empty(base.out_features, RANK, **options))
        for factor in (self.A, self.B):
            bound = (factor.numel() / GROUPS) ** -0.5
            nn.init.uniform_(factor, -bound, bound)

    def _merge(self, A: Tensor, B: Tensor) -> Tensor:
        pairs = zip(A.chunk(GROUPS, 1), B.chunk(GROUPS, 1), strict=True)
        K = sum((-1) ** p * SCALE * torch.cdist(b, a) for p, (a, b) in enumerate(pairs))
        magnitude = K.detach().abs()
        threshold = float(torch.quantile(magnitude, SPARSITY))
        return K * torch.where(magnitude > threshold, magnitude, 0)

    def forward(self, x: Tensor) -> Tensor:
        delta = checkpoint(self._merge, self.A, self.B, use_reentrant=False)
        return nn.functional.linear(x, self.base.weight + delta.to(x.dtype), self.base.bias)


class _Wrapped(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear


def _lora(base: nn.Linear) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"])
    # LoRA's fastest form: factors in the base's dtype. By default PEFT keeps them in float32 and converts x twice.
    model = get_peft_model(_Wrapped(base), config, autocast_adapter_dtype=False)
    return model.base_model.model.linear


def _snell(base: nn.Linear) -> nn.Module:
    return SnellLinear.from_linear(base, rank=RANK, sparsity=SPARSITY, groups=GROUPS, scale=SCALE)


LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {"snell": _snell, "lora": _lora, "published": Published}


class Contender:
    """One method on one case: ``step()`` is a forward and a backward of new parameters, gradients dropped after."""

    def __init__(self, method: str, case: Case, x: Tensor, grad_y: Tensor) -> None:
        options = {"device": case.device, "dtype": case.dtype}
        self.x, self.grad_y = x, grad_y
        self.layer = LAYERS[method](nn.Linear(case.in_features, case.out_features, **options))
        self.inputs = (x, *(p for p in self.layer.parameters() if p.requires_grad))

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def step(self) -> None:
        memo.clear()  # a training step's factors are new, so its threshold is selected anew
        torch.autograd.grad(self.forward(), self.inputs, self.grad_y)


class Floor:
    """x W^T, dY W and dY^T X of the case, results dropped after."""

    def __init__(self, case: Case, x: Tensor, grad_y: Tensor) -> None:
        self.x, self.grad_y = x.detach(), grad_y
        self.weight = torch.randn(case.out_features, case.in_features, device=case.device, dtype=case.dtype)

    def step(self) -> None:
        _ = self.x @ self.weight.T, self.grad_y @ self.weight, self.grad_y.T @ self.x
