"""Factors on adapters' updates, as LoRA's layers have them: dW times a number, the same entries surviving."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["Scaled", "rescale_adapter_scale"]


class Scaled:
    """A layer whose adapters' updates are multiplied by :attr:`scaling`. The factors are not saved.

    A merged adapter's weight holds the update as it was scaled at the time, so its factor cannot change.

    Attributes:
        scaling: what dW is multiplied by, by adapter name; 1 for a fresh or loaded adapter.
    """

    scaling: dict[str, float]
    active_adapters: list[str]
    merged_adapters: list[str]

    def _scaled(self, share: Tensor, adapter: str) -> Tensor:
        return share if self.scaling[adapter] == 1 else share * self.scaling[adapter]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply dW of this adapter by ``scale`` from now on. Nothing happens where the layer lacks the adapter.

        Raises:
            TypeError: ``scale`` is no number.
            ValueError: ``scale`` is not finite, or the adapter is merged.
        """
        if adapter not in self.scaling:
            return
        _check(scale, "scale")
        if adapter in self.merged_adapters:
            raise ValueError(f"the scale of {adapter!r} cannot change while it is merged: call unmerge_adapter() first")
        self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of all active adapters by ``scale``."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, self.scaling.get(adapter, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of all active adapters by ``scale``; None: set them to 1."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, 1.0 if scale is None else self.scaling.get(adapter, 1.0) / scale)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """``peft.helpers.rescale_adapter_scale`` for SNELL adapters: that of PEFT looks for LoRA's layers alone.

    Within the context dW of every adapter is multiplied by ``multiplier``. Afterwards the factors are as before, but
    those of adapters that were merged inside and still are.

    Args:
        model: any module with SNELL layers, none of them merged.
        multiplier: a finite number.

    Raises:
        TypeError: ``multiplier`` is no number.
        ValueError: ``multiplier`` is not finite, there is no SNELL layer, or an adapter is merged.
    """
    _check(multiplier, "multiplier")
    layers = [module for module in model.modules() if isinstance(module, Scaled)]
    if not layers:
        raise ValueError("model must have SNELL layers to be scaled; got none")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for adapter, scale in layer.scaling.items():
                layer.set_scale(adapter, scale * multiplier)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            kept = set(layer.scaling) - set(layer.merged_adapters)
            layer.scaling.update({adapter: scale for adapter, scale in scaling.items() if adapter in kept})


def _check(scale: float, name: str) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name} must be a number; got {scale!r} ({type(scale).__name__})")
    if not math.isfinite(scale):
        raise ValueError(f"{name} must be finite; got {scale}")
