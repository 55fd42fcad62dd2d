"""Puts SNELL layers into a model, as PEFT asks of a tuner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, replicate_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from snell.initial import warn_if_dead, warn_if_large
from snell.peft.common import base, checkpoint
from snell.peft.common.model import TunerModel
from snell.peft.snell.competition import BudgetReminder, Competition
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.convolution import AdaptedConvolution
from snell.peft.snell.embedding import AdaptedEmbedding
from snell.peft.snell.layer import AdaptedLinear
from snell.spec import Spec

__all__ = ["SnellModel"]


class SnellModel(TunerModel):
    """A model whose target layers carry SNELL adapters; what ``get_peft_model`` builds for a :class:`SnellConfig`.

    Args:
        model: the model to adapt; its parameters are frozen.
        peft_config: a :class:`SnellConfig`, or several by adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the factors on the meta device, to be loaded into.
    """

    prefix: str = "snell_"
    tuner_layer_cls = AdaptedLinear
    other_layers = {nn.Embedding: AdaptedEmbedding, **dict.fromkeys(base.CONVOLUTIONS, AdaptedConvolution)}
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: SnellConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        if config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f"bias={config.bias!r} needs peft 0.21 or newer: older ones do not save biases with SNELL")

    def _prepare_model(self, config: SnellConfig, model: nn.Module) -> None:  # type: ignore[override]
        if config.layer_replication:
            replicate_layers(model, config.layer_replication)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise ValueError("cannot merge with layer_replication: blocks with adapters of their own share a weight")

    @staticmethod
    def check_mixed(config: Any) -> None:
        """Refuse a competition over all layers."""
        if config.competition == "model":
            raise ValueError("competition must not be 'model' where a model mixes tuners")

    @staticmethod
    def _settings(config: SnellConfig, key: str) -> tuple[Spec, SnellConfig]:
        return config.spec_of(key), config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT does, and warn of layers that will not train or that start with an update larger than the weight."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if config.competition == "model":
            self._compete(adapter_name, config.sparsity)
        elif config.competition == "budget":
            layers = [layer for _, layer in self._layers(adapter_name)]
            self._before_forward(adapter_name, BudgetReminder(adapter_name, layers))
        sizes: dict[str, float] = {}
        for name, layer in self._layers(adapter_name):
            spec = layer.snell_spec[adapter_name]
            warn_if_dead(spec, layer.out_features, layer.in_features, name)
            # What a loaded adapter starts with is replaced, and a start for tests is meant to show.
            if config.init_weights is True and not config.inference_mode:
                sizes[name] = layer.relative_size(adapter_name)
        warn_if_large(sizes, config.scale)

    def _compete(self, adapter_name: str, sparsity: float) -> None:
        layers = dict(self._layers(adapter_name))
        competition = Competition(adapter_name, layers, sparsity)
        for layer in layers.values():
            layer.snell_competition[adapter_name] = competition
        self._before_forward(adapter_name, competition.before_forward)

    def _before_forward(self, adapter_name: str, act: Callable[[nn.Module, Any], None]) -> None:
        hook = self.model.register_forward_pre_hook(act)
        self.__dict__.setdefault("_acts", {})[adapter_name] = act, hook

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Layers that compete with each other get their thresholds first."""
        for act, _ in self.__dict__.get("_acts", {}).values():
            act(self.model, args)  # PEFT calls model.forward, which runs no hook
        return super().forward(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        super().delete_adapter(adapter_name)
        _, hook = self.__dict__.get("_acts", {}).pop(adapter_name, (None, None))
        if hook is not None:
            hook.remove()

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
        # A fresh model has no such entry, from whose name PEFT would learn where the adapter's belongs.
        own, named = ".snell_sparsity.weight", f".snell_sparsity.{adapter_name}.weight"
        state_dict = {
            f"{key.removesuffix(own)}{named}" if key.endswith(own) else key: value for key, value in state_dict.items()
        }
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
