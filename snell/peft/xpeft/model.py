"""Puts layers with masks into a model, as PEFT asks of a tuner."""

from __future__ import annotations

from typing import Any

from snell.peft.common.feed_forward import FeedForwardModel
from snell.peft.xpeft.config import XpeftConfig
from snell.peft.xpeft.layer import MaskedLinear

__all__ = ["XpeftModel"]


class XpeftModel(FeedForwardModel):
    """A model whose target layers take their update from a bank; what ``get_peft_model`` builds for an XpeftConfig.

    Args:
        model: the model to adapt; its parameters are frozen.
        peft_config: a :class:`XpeftConfig`, or several by adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the masks on the meta device, to be loaded into.
    """

    prefix: str = "xpeft_"
    tuner_layer_cls = MaskedLinear

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        modules = peft_config.source().modules
        if peft_config.target_modules is None and modules is not None:
            peft_config.target_modules = set(modules)
        return super()._prepare_adapter_config(peft_config, model_config)

    @staticmethod
    def _settings(config: XpeftConfig, key: str) -> tuple[Any, ...]:
        source = config.source()
        return config, key, source, config.make_up(source)
