"""How much of an adapter's update PEFT's conversion to LoRA loses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from snell.peft.snell.layer import AdaptedLinear

__all__ = ["LoraError", "lora_error"]


class LoraError(NamedTuple):
    """Relative errors in the Frobenius norm, norm(dW - B A) / norm(dW).

    Attributes:
        whole: of all layers together, as if their updates were one matrix.
        layers: by name of the layer in the base model.
    """

    whole: float
    layers: dict[str, float]


@torch.no_grad()
def lora_error(model: PeftModel, state_dict: dict[str, Tensor], adapter_name: str = "default") -> LoraError:
    """The error of ``peft.convert_to_lora(model, rank, adapter_name)``, whose second result is ``state_dict``.

    An update of zeros has error 0, and a layer that ``state_dict`` lacks has error 1.

    Raises:
        ValueError: no layer has an adapter of that name.
    """
    layers: dict[str, float] = {}
    lost = size = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear) or adapter_name not in layer.adapter_names:
            continue
        delta = layer.get_delta_weight(adapter_name).double()
        delta = delta.T if layer.fan_in_fan_out else delta
        A, B = (state_dict.get(f"{name}.lora_{factor}.weight") for factor in "AB")
        product = B.to(delta) @ A.to(delta) if A is not None and B is not None else torch.zeros_like(delta)
        missed, norm = (delta - product).norm().item(), delta.norm().item()
        layers[name.removeprefix("base_model.model.")] = missed / norm if norm else 0.0
        lost, size = lost + missed**2, size + norm**2
    if not layers:
        raise ValueError(f"adapter_name must be one of a SNELL adapter; got {adapter_name!r}")
    return LoraError((lost / size) ** 0.5 if size else 0.0, layers)
