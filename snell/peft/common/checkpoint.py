"""What a layer does with a state dict before PyTorch loads it, and PEFT with a checkpoint before that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer

T = TypeVar("T")


def modernise(layer: BaseTunerLayer, state_dict: dict[str, Any], prefix: str) -> None:
    """Give the layer's tensors today's names in place: ``snell_A.default``, as models had them, gets a ``.weight``."""
    for key in _parents(layer, prefix):
        if key in state_dict:
            state_dict[f"{key}.weight"] = state_dict.pop(key)


def modernised(names: tuple[str, ...], checkpoint: dict[str, T]) -> dict[str, T]:
    """Likewise an adapter's file: keys that end in one of ``names`` get a ``.weight``."""
    return {f"{key}.weight" if key.endswith(names) else key: value for key, value in checkpoint.items()}


def not_finite(layer: BaseTunerLayer, state_dict: dict[str, Any], prefix: str) -> Iterator[str]:
    """One message for each of the layer's adapter tensors whose values in the checkpoint are not finite."""
    for key in _parents(layer, prefix):
        tensor = state_dict.get(f"{key}.weight")
        if tensor is not None and not tensor.is_meta and not tensor.isfinite().all():
            yield f"{key}.weight holds NaN or infinite values: the checkpoint is broken"


def _parents(layer: BaseTunerLayer, prefix: str) -> Iterator[str]:
    return (f"{prefix}{name}.{adapter}" for name in layer.adapter_layer_names for adapter in getattr(layer, name))
