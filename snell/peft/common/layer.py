"""What every tuner's layer does alike: paths of the forward pass, merging, loading, moving."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from snell.peft.common import base, checkpoint

__all__ = ["Change", "TunerLayer"]


class Change(Protocol):
    """What merging one adapter does to the base layer. Calls can be repeated wherever an interrupt stopped them."""

    def put_in(self, weight: Tensor) -> None:
        """Change ``weight [m, n]`` in place."""

    def take_out(self, weight: Tensor) -> None:
        """Put it back, bit for bit."""


class TunerLayer(nn.Module, BaseTunerLayer):
    """A base layer with adapters of one tuner.

    Args:
        base_layer: an nn.Linear, a Conv1D, an opaque layer with in_features and out_features, or another tuner's layer
            around one of these.
        fan_in_fan_out: whether the base weight is stored [n, m].
        quantisation: what PEFT's quantisation backends need beside the base layer, to merge into it.

    Attributes:
        tuner: the tuner's name, for messages.
        base_layer: the layer adapted.  in_features, out_features: n and m.
        merged_adapters: names of the adapters that the base weight holds, in the order they went in.
    """

    tuner: str

    def __init__(
        self, base_layer: nn.Module, *, fan_in_fan_out: bool = False, quantisation: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = fan_in_fan_out
        self.quantisation = quantisation or {}
        self.in_features, self.out_features = base.features(base_layer)
        self._disable_adapters = False
        self._merged: dict[str, Change | base.Quantised] = {}
        self._merged_below = False

    @abstractmethod
    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output ``[..., m]`` with the active adapters, of which there is at least one."""

    @abstractmethod
    def _adapt_samples(self, y: Tensor, x: Tensor, samples: Tensor, name: str) -> Tensor:
        """The base's output ``y`` with the adapter applied to the samples of these indices."""

    @abstractmethod
    def _change(self, name: str, weight: Tensor, safe_merge: bool) -> Change:
        """What merging this adapter would do; nothing is written yet.

        Raises:
            ValueError: ``safe_merge``, and the result would not be finite.
        """

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters that this layer has."""
        return list(getattr(self, self.adapter_layer_names[0]))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., n] -> [..., m]``. ``adapter_names`` gives each sample its own adapter, ``__base__`` being none."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if torch.onnx.is_in_onnx_export() and not (self.merged or self.disable_adapters):
            raise RuntimeError(
                f"a model with an unmerged {self.tuner} adapter has no ONNX form: export what merge_and_unload() "
                "returns, or call merge_adapter() first"
            )
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.adapter_names]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(x, active, *args, **kwargs)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in dict.fromkeys(adapter_names):
            if name in self.adapter_names:
                samples = [i for i, other in enumerate(adapter_names) if other == name]
                y = self._adapt_samples(y, x, torch.tensor(samples, device=y.device), name)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base layer, in place; another tuner's layer below is merged first.

        Until they are unmerged the layer keeps what they replaced, so that unmerging gives it back bit for bit.

        Args:
            safe_merge: look for NaN and infinity before the weight is touched.
            adapter_names: which adapters; None: the active ones.

        Raises:
            ValueError: ``safe_merge`` found a merged weight that is not finite.
            TypeError: the base layer is opaque, and PEFT cannot quantise it anew.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapter_names]
        below = self.base_layer
        if names and isinstance(below, BaseTunerLayer) and not below.merged:
            self._merged_below = True
            below.merge(safe_merge=safe_merge)
        for name in names:
            weight = base.float_weight(self.get_base_layer(), self.fan_in_fan_out)
            target = weight if weight is not None else base.dequantise(self)
            change = self._change(name, target, safe_merge)
            record = change if weight is not None else base.Quantised.of(self)
            try:
                self._merged[name] = record
                change.put_in(target)
                if weight is None:
                    base.requantise(self, target)
            except BaseException:  # KeyboardInterrupt too: undo
                self._take_out(name, record)
                raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base layer back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self._merged:
            name, record = next(reversed(self._merged.items()))
            try:
                self._take_out(name, record)
            except BaseException:  # KeyboardInterrupt too: finish
                self._take_out(name, record)
                raise
        if self._merged_below:
            self.base_layer.unmerge()  # type: ignore[operator]
            self._merged_below = False

    def _take_out(self, name: str, record: Change | base.Quantised) -> None:
        if isinstance(record, base.Quantised):
            record.put_back(self)
        else:
            weight = base.float_weight(self.get_base_layer(), self.fan_in_fan_out)
            assert weight is not None  # it was when this was merged
            record.take_out(weight)
        self._merged.pop(name, None)

    def unmerged_weight(self) -> Tensor:
        """A copy of the float base weight without what is merged into it, laid out as it is."""
        base_layer: Any = self.get_base_layer()
        weight = base_layer.weight.detach().clone()
        for record in reversed(self._merged.values()):
            record.take_out(weight.T if self.fan_in_fan_out else weight)  # type: ignore[union-attr]
        return weight

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Names of the merged adapters, in the order they went in."""
        return list(self._merged)

    def _factors(self, adapter_name: str) -> Iterator[Any]:
        dicts = (getattr(self, name) for name in self.adapter_layer_names)
        return (factors[adapter_name] for factors in dicts if adapter_name in factors)

    def _moved(self) -> None:
        """Called when factors may have got another device or dtype."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would round the factors to the base's dtype.
        device = device or base.device_and_dtype(self.base_layer)[0]
        for factor in self._factors(adapter_name):
            if not factor.weight.is_meta:
                factor.weight.data = factor.weight.data.to(device)
        self._moved()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TunerLayer:
        # What was replaced has the old device and dtype, so merged adapters come out first.
        merged = list(self.merged_adapters)
        if merged:
            self.unmerge()
        super()._apply(fn, recurse)
        self._moved()
        if merged:
            self.merge(adapter_names=merged)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoint.modernise(self, state_dict, prefix)
        args[-1].extend(checkpoint.not_finite(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "snell." + super().__repr__()
