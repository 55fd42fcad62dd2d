"""What growth puts side by side at one point: SNELL, PEFT's LoRA, and the GEMMs that any such step has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from snell import SnellLinear, memo
from snell.bench.cost_model import Point
from snell.bench.measure import Step, extra_peak_bytes, saved_bytes

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


class Layers:
    """Forward and backward through ``depth`` layers of one kind, parameters as new as in a training step."""

    def __init__(self, layers: nn.Module, x: Tensor, grad_y: Tensor) -> None:
        self.layers, self.x, self.grad_y = layers, x, grad_y
        self.inputs = (x, *(p for p in layers.parameters() if p.requires_grad))

    def forward(self) -> Tensor:
        return self.layers(self.x)

    def step(self) -> None:
        memo.clear()
        torch.autograd.grad(self.forward(), self.inputs, self.grad_y)

    def memory(self, device: str) -> dict[str, int | None]:
        """Bytes kept for backward beyond parameters, and the peak over what was held before a step."""
        saved = saved_bytes(self.forward, list(self.layers.parameters()))
        return {"saved_bytes": saved, "extra_peak_bytes": extra_peak_bytes(self.step, device)}


def _snell(bases: Sequence[nn.Linear], point: Point) -> nn.Module:
    settings = {"rank": point.rank, "sparsity": point.sparsity}
    return nn.Sequential(*(SnellLinear.from_linear(base, **settings) for base in bases))


def _lora(bases: Sequence[nn.Linear], point: Point) -> nn.Module:
    names = [str(index) for index in range(len(bases))]
    config = LoraConfig(r=point.rank, lora_alpha=point.rank, target_modules=names)
    return get_peft_model(nn.Sequential(*bases), config, autocast_adapter_dtype=False).base_model.model


METHODS: dict[str, Callable[[Sequence[nn.Linear], Point], nn.Module]] = {"snell": _snell, "lora": _lora}


def gemms(bases: Sequence[nn.Linear], x: Tensor, grad_y: Tensor) -> dict[str, Step]:
    """The floor's products over all layers: the two that any step has, and the one that gives G."""
    weights, inputs = [base.weight.detach() for base in bases], x.detach()

    def two() -> None:
        for weight in weights:
            _ = inputs @ weight.T, grad_y @ weight

    def third() -> None:
        for _ in weights:
            _ = grad_y.T @ inputs

    return {"two gemms": two, "third gemm": third}


def built(point: Point, device: str) -> tuple[list[nn.Linear], Tensor, Tensor, dict[str, Layers]]:
    """The frozen layers, x, the gradient of y, and both methods on them."""
    options = {"device": device, "dtype": DTYPES[device]}
    bases = [nn.Linear(point.in_features, point.out_features, **options) for _ in range(point.depth)]
    x = torch.randn(point.tokens, point.in_features, **options).requires_grad_()
    grad_y = torch.randn(point.tokens, point.out_features, **options)
    return bases, x, grad_y, {name: Layers(build(bases, point), x, grad_y) for name, build in METHODS.items()}
