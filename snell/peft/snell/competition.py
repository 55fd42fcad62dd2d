"""One threshold for all layers of an adapter, ``SnellConfig(competition="model")``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from snell import backends
from snell.competition import memo
from snell.competition.shared import select_shared
from snell.initial import size_at_start
from snell.peft.common import base
from snell.update import Parameters

__all__ = ["BudgetReminder", "Competition", "thresholds"]


def thresholds(layers: Sequence[Parameters], sparsity: float) -> list[Tensor]:
    """Each layer's threshold, such that all layers' entries compete by \\|K\\| over its size at the start.

    A fresh adapter then has about the same sparsity in each layer.
    """
    scales = [size_at_start(len(B), len(A), spec, sparsity) for A, B, _, spec in layers]
    return select_shared(layers, sparsity, scales)


class Competition:
    """The layers that an adapter has in a model, whose entries compete for the total that its sparsity leaves.

    Thresholds are selected at the start of each forward of the model, if factors have changed, and when a layer is
    asked whose own have. The content of the factors tells on a CPU. Elsewhere PyTorch's versions tell, which miss a
    replayed CUDA graph, an optimizer that writes through raw pointers, and ``.data``.

    Args:
        name: the adapter's.
        layers: by name in the model.
        sparsity: share of all layers' entries that are zero.

    Raises:
        ValueError: a layer is split over processes.
    """

    def __init__(self, name: str, layers: dict[str, Any], sparsity: float) -> None:
        for layer_name, layer in layers.items():
            if base.split(layer.base_layer, layer.fan_in_fan_out) is not None:
                raise ValueError(f"competition must be 'layer': {layer_name} is split over processes")
        self.name, self.sparsity, self.layers = name, sparsity, list(layers.values())
        self._places = {id(layer): place for place, layer in enumerate(self.layers)}
        self._taus: list[Tensor] = []
        self._seen: list[tuple] = []
        self._starts: tuple[Any, list[Tensor]] = (None, [])

    def __deepcopy__(self, copies: dict[int, Any]) -> Competition:
        # Copied with its layers. Their places are found by identity, which a copy does not keep.
        new = copies[id(self)] = object.__new__(Competition)
        new.name, new.sparsity = self.name, self.sparsity
        new.layers = [deepcopy(layer, copies) for layer in self.layers]
        new._places = {id(layer): place for place, layer in enumerate(new.layers)}
        new._taus, new._seen, new._starts = [], [], (None, [])
        return new

    def before_forward(self, model: nn.Module, args: Any) -> None:
        """A forward pre-hook of the model."""
        self.refresh()

    @torch.compiler.disable
    @torch.no_grad()
    def refresh(self) -> None:
        """Select the thresholds anew if factors have changed."""
        for layer in self.layers:
            A = next(layer._factors(self.name)).weight
            if hasattr(A, "device_mesh") or len(A) != layer.in_features:
                raise ValueError("competition must be 'layer' where factors are sharded (FSDP)")
        parameters = [layer._parameters_of(self.name) for layer in self.layers]
        seen = [_versions(layer, self.name) for layer in self.layers]
        if parameters[0][0].device.type != "cpu":
            if seen != self._seen:
                self._taus = thresholds(parameters, self.sparsity)
        else:
            tensors = [tensor.contiguous() for one in parameters for tensor in one[:3]]
            content = memo.fingerprint(*tensors), parameters[0][0].dtype, backends.of(tensors[0]).name, self.sparsity
            self._taus = list(
                memo.remember_at(id(self), content, lambda: torch.stack(thresholds(parameters, self.sparsity)))
            )
        self._seen = seen

    def tau(self, layer: Any) -> Tensor:
        """The layer's threshold."""
        place = self._places[id(layer)]
        # Under FSDP2 the layer's parameters are others while it computes, gathered from those that were seen.
        if not torch.compiler.is_compiling():
            now = _versions(layer, self.name)
            if not self._taus or any(a[0] == b[0] and a != b for a, b in zip(now, self._seen[place], strict=True)):
                self.refresh()
        return self._taus[place]

    def start(self, layer: Any) -> Any:
        """The update that an identity start of the layer subtracts, with a threshold of the start's competition."""
        A = layer._parameters_of(self.name)[0]
        starts = [one.snell_start[self.name].like(A).update for one in self.layers]
        key = A.device, A.dtype
        if self._starts[0] != key:
            self._starts = key, thresholds([(*update[:3], update.spec) for update in starts], self.sparsity)
        place = self._places[id(layer)]
        return starts[place]._replace(tau=self._starts[1][place])


class BudgetReminder:
    """A forward pre-hook of a model, which warns where the adapter's layers were to have a budget and train without.

    Args:
        name: the adapter's.
        layers: those that it has.
    """

    def __init__(self, name: str, layers: Sequence[Any]) -> None:
        self.name, self.layers, self.done = name, layers, False

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: Any) -> None:
        """Warn once, in training."""
        if self.done or not (model.training and torch.is_grad_enabled()):
            return
        self.done = True
        if not any(layer.has_own_sparsity(self.name) for layer in self.layers):
            warnings.warn(
                f"adapter {self.name!r} has competition='budget' and trains without a budget: each layer keeps the "
                "same share. snell.training.BudgetCallback or SparsityBudget divides the total",
                stacklevel=2,
            )


def _versions(layer: Any, name: str) -> tuple:
    tensors = [factor.weight for factor in layer._factors(name)]
    return tuple((id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
