"""Puts a tuner's layers into a model, as PEFT asks of a tuner."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from snell.peft.common.base import CONVOLUTIONS, innermost
from snell.peft.common.layer import TunerLayer

__all__ = ["TunerModel"]


class TunerModel(BaseTuner):
    """A model whose target layers are ``tuner_layer_cls``, a :class:`TunerLayer`."""

    tuner_layer_cls: type[TunerLayer]
    #: What takes its place, a subclass of it, by class of the base layer.
    other_layers: dict[type[nn.Module], type[TunerLayer]] = {}

    @staticmethod
    @abstractmethod
    def _settings(config: Any, key: str) -> tuple[Any, ...]:
        """What ``update_layer`` of the module of this name takes after the adapter's name."""

    @staticmethod
    def check_mixed(config: Any) -> None:
        """Refuse what a model that mixes tuners cannot serve."""
        return None

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        self.put_in(self, *args, **kwargs)

    @classmethod
    def put_in(
        cls,
        tuner: BaseTuner,
        config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        """Give one module an adapter; ``tuner`` is the model it belongs to, which may mix tuners."""
        settings = cls._settings(config, current_key)
        kind: Any = cls._layer_cls(target)
        if type(target) is kind:  # and no other tuner's that inherits from it
            adapted: Any = target
            adapted.update_layer(adapter_name, *settings)
            return
        cls._check_target(target, parent, current_key, adapter_name)
        layer = kind(
            target,
            adapter_name,
            *settings,
            fan_in_fan_out=_fan_in_fan_out(target, config),
            quantisation=_quantisation(tuner.model),
        )
        if adapter_name not in tuner.active_adapters:
            layer.requires_grad_(False)
        tuner._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # has no parameter named weight for the module it held
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _layer_cls(cls, target: nn.Module) -> type[TunerLayer]:
        inner = innermost(target)
        return next((kind for of, kind in cls.other_layers.items() if isinstance(inner, of)), cls.tuner_layer_cls)

    @classmethod
    def _check_target(cls, target: nn.Module, parent: nn.Module, key: str, adapter_name: str) -> None:
        tuner = cls.tuner_layer_cls.tuner
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{key} cannot be adapted: torch.nn.MultiheadAttention reads its weight and never calls the layer; "
                "leave it out with exclude_modules"
            )
        if isinstance(target, BaseTunerLayer) and adapter_name in target._all_available_adapter_names():
            raise ValueError(
                f"adapter_name must not be {adapter_name!r}: another tuner's adapter of {key} has that name; name the "
                f"{tuner} adapter otherwise"
            )
        inner = innermost(target)
        sizes = (getattr(inner, "in_features", None), getattr(inner, "out_features", None))
        known = isinstance(inner, (Conv1D, *cls.other_layers))
        if not known and not all(isinstance(size, int) for size in sizes):
            others = "".join(f", {kind.__name__}" for kind in cls.other_layers)
            raise TypeError(
                f"{key} cannot be adapted: it is a {type(inner).__name__}; {tuner} adapts torch.nn.Linear{others}, "
                "transformers' Conv1D and layers with in_features and out_features (quantised ones); change "
                "target_modules"
            )

    def _layers(self, adapter_name: str) -> Iterator[tuple[str, Any]]:
        """Names of the layers that have this adapter, and the layers."""
        for name, module in self.model.named_modules():
            if (
                type(module) in (self.tuner_layer_cls, *self.other_layers.values())
                and adapter_name in module.adapter_names
            ):
                yield name, module

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """For the time of one forward: tell every layer which adapter each sample of the batch asks for."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, self.tuner_layer_cls)]
        known = {name for layer in layers for name in layer.adapter_names}
        if unknown := sorted(set(names) - known - {"__base__"}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # Beam search repeats each sample in the decoder, after the encoder has seen it once.
        beams = kwargs.get("num_beams") or 1
        encoder = _encoder(self.model) if beams > 1 else None
        in_encoder = set() if encoder is None else set(encoder.modules())
        repeated = [name for name in names for _ in range(beams)]
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_names, names=names if module in in_encoder else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _quantisation(model: nn.Module) -> dict[str, Any]:
    """How torchao is asked to quantise a merged weight anew; transformers keeps it with the model."""
    settings = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    requantise = getattr(settings, "get_apply_tensor_subclass", None)
    return {} if requantise is None else {"get_apply_tensor_subclass": requantise}


def _pass_names(module: nn.Module, args: tuple, kwargs: dict, *, names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": names}


def _encoder(model: nn.Module) -> nn.Module | None:
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None  # type: ignore[operator]
    return None if encoder is model else encoder


def _fan_in_fan_out(target: nn.Module, config: Any) -> bool:
    target = innermost(target)
    if isinstance(target, (Conv1D, nn.Embedding)):
        return True
    if isinstance(target, CONVOLUTIONS):
        return False
    if isinstance(target, nn.Linear) and config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is True, but the target is a torch.nn.Linear: using False", stacklevel=2)
        config.fan_in_fan_out = False
    return config.fan_in_fan_out
