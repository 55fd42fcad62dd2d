"""The adapters of a PEFT model, one for each adapted layer, and what each adds to its layer's output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell.peft import AdaptedLinear

__all__ = ["adapters_of", "outputs", "parameters_of"]


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """The adapted layers that train something, by their names in the model.

    Raises:
        ValueError: there are none.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    trained = {name: layer for name, layer in found.items() if any(p.requires_grad for p in parameters_of(layer))}
    if not trained:
        why = "it has no adapted layer" if not found else f"none of its {len(found)} adapted layers is trained"
        raise ValueError(
            f"model must carry a PEFT tuner's adapters that are trained, as get_peft_model() gives; {why} "
            f"({type(model).__name__}). Prompt methods adapt no layer"
        )
    return trained


def parameters_of(layer: Any) -> Iterator[nn.Parameter]:
    """The parameters of the layer's adapters, without those of the layer that they adapt."""
    return (p for name, p in layer.named_parameters() if not name.startswith("base_layer."))


def outputs(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer gives for ``x`` without its active adapters, and what they add: both ``[N, d]``.

    For SNELL and plain LoRA the second comes from the adapter's own branch. For other tuners it is a difference, which
    in half precision cannot show changes below 2^-8 of the output.
    """
    plain = layer.base_layer(x)
    wide = torch.promote_types(plain.dtype, torch.float32)
    names = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())]
    if isinstance(layer, AdaptedLinear):
        shares = [layer.share(x, name) for name in layer.active_adapters if name in layer.snell_A]
    elif isinstance(layer, LoraLayer) and names and all(_is_plain(layer, name) for name in names):
        shares = [_lora_share(layer, x, name) for name in names]
    else:
        shares = [layer.forward(x).to(wide) - plain.to(wide)]
    change = sum((share.to(wide) for share in shares), torch.zeros_like(plain, dtype=wide))
    if isinstance(layer.get_base_layer(), nn.modules.conv._ConvNd):
        plain, change = plain.movedim(1, -1), change.movedim(1, -1)
    return plain, change


def _is_plain(layer: LoraLayer, name: str) -> bool:
    return name not in layer.lora_variant and isinstance(layer.lora_A[name], nn.Linear)


def _lora_share(layer: LoraLayer, x: Tensor, name: str) -> Tensor:
    A: nn.Module = layer.lora_A[name]
    B: nn.Module = layer.lora_B[name]
    return B(A(x.to(next(A.parameters()).dtype))) * layer.scaling[name]
