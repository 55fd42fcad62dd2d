"""Why a checkpoint does not fit an adapter, beyond the shapes that PyTorch compares by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer


def not_finite(layer: BaseTunerLayer, state_dict: dict[str, Any], prefix: str) -> Iterator[str]:
    """One message for each of the layer's adapter tensors whose values in the checkpoint are not finite."""
    for key in _keys(layer, prefix):
        tensor = state_dict.get(key)
        if tensor is not None and not tensor.is_meta and not tensor.isfinite().all():
            yield f"{key} holds NaN or infinite values: the checkpoint is broken"


def missing(layers: Iterable[tuple[str, BaseTunerLayer]], state_dict: dict[str, Any]) -> Iterator[str]:
    """One message for each tensor of the named layers that the checkpoint of their adapter lacks.

    A state dict may hold some adapters of a model and not others; one that holds an adapter holds all of it.
    """
    layers = list(layers)
    names = {name for _, layer in layers for name in layer.adapter_layer_names}
    held = {key.rpartition(".")[2] for key in state_dict if any(f".{name}." in key for name in names)}
    for prefix, layer in layers:
        for key in _keys(layer, prefix):
            if key not in state_dict and key.rpartition(".")[2] in held:
                yield f"{key} is missing from the checkpoint: it was saved from another model or configuration"


def _keys(layer: BaseTunerLayer, prefix: str) -> Iterator[str]:
    return (f"{prefix}{name}.{adapter}" for name in layer.adapter_layer_names for adapter in getattr(layer, name))
