"""Why a checkpoint does not fit an adapter, beyond the shapes that PyTorch compares by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def complaints(layer: nn.Module, state_dict: dict[str, Any], prefix: str) -> Iterator[str]:
    """One message for each of the layer's tensors that is missing from its adapter's checkpoint or is not finite.

    A state dict may hold some adapters of a model and not others; one that holds an adapter holds all of it.
    """
    for names in ("snell_A", "snell_B", "snell_theta"):
        for adapter in getattr(layer, names):
            key = f"{prefix}{names}.{adapter}"
            tensor = state_dict.get(key)
            if tensor is None:
                if any(other.endswith(f".snell_A.{adapter}") for other in state_dict):
                    yield f"{key} is missing from the checkpoint: it was saved from another model or configuration"
            elif not tensor.is_meta and not tensor.isfinite().all():
                yield f"{key} holds NaN or infinite values: the checkpoint is broken"
