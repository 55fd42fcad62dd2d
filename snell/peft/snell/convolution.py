"""SNELL adapters of convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from snell import functional
from snell.peft.common import base
from snell.peft.snell.layer import AdaptedLinear

__all__ = ["AdaptedConvolution"]


class AdaptedConvolution(AdaptedLinear):
    """An nn.Conv1d, Conv2d or Conv3d with adapters, whose kernel is the matrix [out_channels, what remains].

    Convolutions in groups are adapted alike: their kernel is a matrix with fewer columns. Where nothing is dropped the
    layer convolves once, with the kernel that merging would give.

    Raises:
        ValueError: the convolution is split over processes.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        base.refuse_split(base_layer)
        super().__init__(base_layer, *args, **kwargs)

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        weight = base.fusable_weight(self.base_layer, False)
        if weight is None or args or kwargs or any(map(self._drops, active)):
            return super()._adapted(x, active, *args, **kwargs)
        for name in active:
            adapted = functional.dense(self._update(name), None, weight.flatten(1), self.scaling[name])
            weight = adapted.view(weight.shape)
        return self._convolve(x, weight, base.bias(self.base_layer))

    def share(self, x: Tensor, name: str) -> Tensor:
        """The adapter's share of the output: the convolution with dW, in x's dtype."""
        return self._convolve(x, self.get_delta_weight(name).to(x.dtype), None)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.get_base_layer()._conv_forward(x, weight, bias)  # type: ignore[operator]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense dW of one adapter, less its start's, in the kernel's shape; float32, or float64 as the kernel."""
        kernel: Any = self.get_base_layer().weight
        return super().get_delta_weight(adapter).view(kernel.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts linear layers alone."""
        return False
