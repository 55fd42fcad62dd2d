"""Makes a tuner known to ``PeftMixedModel``."""

from __future__ import annotations

from typing import Any, Union

from peft.config import PeftConfig
from peft.tuners import mixed

from snell.peft.common.kind import kind
from snell.peft.common.model import TunerModel

__all__ = ["allow_mixing"]


def allow_mixing(name: str, config_cls: type[PeftConfig], model_cls: type[TunerModel]) -> None:
    """Let ``get_peft_model(model, config, mixed=True)`` take this tuner's configurations.

    PEFT has no call for it: it names the tuners that it mixes in the constants of one module, which are extended here.
    """
    source: Any = mixed.model
    mixed.COMPATIBLE_TUNER_TYPES = source.COMPATIBLE_TUNER_TYPES = (*source.COMPATIBLE_TUNER_TYPES, kind(name))
    source.PREFIXES.append(model_cls.prefix)
    source.Configs = Union[source.Configs, config_cls]  # noqa: UP007
    source.Layers = (*source.Layers, model_cls.tuner_layer_cls)
    others = source.MixedModel._create_and_replace

    def create_and_replace(self: mixed.MixedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, config_cls):
            model_cls.check_mixed(config)
            model_cls.put_in(self, config, *args, **kwargs)
        else:
            others(self, config, *args, **kwargs)

    source.MixedModel._create_and_replace = create_and_replace
