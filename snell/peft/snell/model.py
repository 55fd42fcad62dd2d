"""Puts SNELL layers into a model, as PEFT asks of a tuner."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snell.initial import warn_if_dead, warn_if_large
from snell.peft.common import checkpoint
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.layer import AdaptedLinear

__all__ = ["SnellModel"]


class SnellModel(BaseTuner):
    """A model whose target layers carry SNELL adapters; what ``get_peft_model`` builds for a :class:`SnellConfig`.

    Args:
        model: the model to adapt; its parameters are frozen.
        peft_config: a :class:`SnellConfig`, or several by adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the factors on the meta device, to be loaded into.
    """

    prefix: str = "snell_"
    tuner_layer_cls = AdaptedLinear
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: SnellConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        if config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f"bias={config.bias!r} needs peft 0.21 or newer: older ones do not save biases with SNELL")

    def _create_and_replace(  # type: ignore[override]
        self,
        config: SnellConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        spec = config.spec_of(current_key)
        if isinstance(target, AdaptedLinear):
            target.update_layer(adapter_name, spec, config)
            return
        _check_target(target, parent, current_key)
        layer = AdaptedLinear(
            target,
            adapter_name,
            spec,
            config,
            fan_in_fan_out=_fan_in_fan_out(target, config),
            quantisation=_quantisation(self.model),
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT does, and warn of layers that will not train or that start with an update larger than the weight."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        sizes: dict[str, float] = {}
        for name, layer in self._layers(adapter_name):
            spec = layer.snell_spec[adapter_name]
            warn_if_dead(spec, layer.out_features, layer.in_features, name)
            # What a loaded adapter starts with is replaced, and a start for tests is meant to show.
            if config.init_weights is True and not config.inference_mode:
                sizes[name] = layer.relative_size(adapter_name)
        warn_if_large(sizes, config.scale)

    def _layers(self, adapter_name: str) -> Iterator[tuple[str, AdaptedLinear]]:
        for name, module in self.model.named_modules():
            if isinstance(module, AdaptedLinear) and adapter_name in module.snell_A:
                yield name, module

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for _, layer in self._layers(adapter_name):
                layer.round_factors(adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: SnellConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = checkpoint.modernised(AdaptedLinear.adapter_layer_names, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """For the time of one forward: tell every layer which adapter each sample of the batch asks for."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.modules() if isinstance(layer, AdaptedLinear) for name in layer.snell_A}
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
            if isinstance(module, (AdaptedLinear, AuxiliaryTrainingWrapper))
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


def _check_target(target: nn.Module, parent: nn.Module, key: str) -> None:
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{key} cannot be adapted: torch.nn.MultiheadAttention reads its weight and never calls the layer; "
            "leave it out with exclude_modules"
        )
    sizes = (getattr(target, "in_features", None), getattr(target, "out_features", None))
    if not isinstance(target, Conv1D) and not all(isinstance(size, int) for size in sizes):
        raise TypeError(
            f"{key} cannot be adapted: it is a {type(target).__name__}; SNELL adapts torch.nn.Linear, transformers' "
            "Conv1D and layers with in_features and out_features (quantised ones); change target_modules"
        )


def _fan_in_fan_out(target: nn.Module, config: SnellConfig) -> bool:
    if isinstance(target, Conv1D):
        return True
    if isinstance(target, nn.Linear) and config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is True, but the target is a torch.nn.Linear: using False", stacklevel=2)
        config.fan_in_fan_out = False
    return config.fan_in_fan_out
