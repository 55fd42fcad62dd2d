"""Folds a frozen adapter into its layer's weight, and gives the weight back bit for bit.

To that end SNELL keeps the entries that survivors replaced, (1 - s) m n numbers. Other tuners' layers need a copy of
the weight, since rounding W0 + dW loses bits of W0; it is kept in the host's memory and takes none of a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell.peft import AdaptedLinear

__all__ = ["Fold", "can_fold"]


def can_fold(layer: Any, model: nn.Module) -> bool:
    """Whether the layer's weight is a plain float matrix that neither training nor another module uses.

    Quantised and sharded weights are none, and an adapter that PEFT cannot merge is not folded either.
    """
    if getattr(layer, "snell_competition", None):  # what an update holds then depends on layers that still train
        return False
    base: Any = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.requires_grad or layer.merged:
        return False
    users = sum(parameter is weight for module in model.modules() for parameter in module._parameters.values())
    nested = isinstance(getattr(layer, "base_layer", None), BaseTunerLayer)
    return users == 1 and not nested and type(layer).merge is not BaseTunerLayer.merge


class Fold:
    """A layer whose adapters are merged into its weight.

    While it is folded, the layer's state dict holds the weight as it was, so that a saved base model is the base model.
    Loading a state dict unfolds the layer, since the update that it holds may change, and so does disabling adapters.

    Args:
        layer: an adapted layer for which :func:`can_fold` holds.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.base: dict[str, Tensor] = {}
        if not isinstance(layer, AdaptedLinear):
            parameters = layer.get_base_layer().named_parameters(recurse=False)
            self.base = {name: p.detach().to("cpu", copy=True) for name, p in parameters if not p.requires_grad}
        layer.merge()
        write: Callable[..., None] = partial(_write_base, self.base)
        restore: Callable[..., None] = partial(_restore, self.base)
        self._handles = [
            layer.register_state_dict_post_hook(write),
            layer.register_load_state_dict_pre_hook(restore),
            layer.register_forward_pre_hook(partial(_restore_if_disabled, self.base)),
        ]

    @property
    def holds(self) -> bool:
        """Whether the update is still in the weight; PEFT's ``unmerge_adapter`` takes it out too."""
        return bool(self.layer.merged)

    def undo(self) -> None:
        """Give the weight its bits back."""
        for handle in self._handles:
            handle.remove()
        _restore(self.base, self.layer)


# The hooks find their layer in their arguments, so that a copy of the model has hooks of its own.


@torch.no_grad()
def _restore(base: dict[str, Tensor], layer: Any, *_: Any) -> None:
    if layer.merged:
        layer.unmerge()
    for name, kept in base.items():
        getattr(layer.get_base_layer(), name).copy_(kept)
    base.clear()  # what is loaded into the layer from here on stays


def _restore_if_disabled(base: dict[str, Tensor], layer: Any, _: Any) -> None:
    if layer.disable_adapters and layer.merged:
        _restore(base, layer)


def _write_base(base: dict[str, Tensor], layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    if not layer.merged:
        return
    kept = {"weight": layer.unmerged_weight()} if isinstance(layer, AdaptedLinear) else base
    for name, tensor in kept.items():
        state[f"{prefix}base_layer.{name}"] = tensor
