"""Puts RED layers into a model, as PEFT asks of a tuner."""

from __future__ import annotations

from snell.peft.common.feed_forward import FeedForwardModel
from snell.peft.red.config import RedConfig
from snell.peft.red.layer import EditedLinear

__all__ = ["RedModel"]


class RedModel(FeedForwardModel):
    """A model whose target layers' outputs are edited; what ``get_peft_model`` builds for a :class:`RedConfig`.

    Args:
        model: the model to adapt; its parameters are frozen.
        peft_config: a :class:`RedConfig`, or several by adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded into.
    """

    prefix: str = "repr_"
    tuner_layer_cls = EditedLinear

    @staticmethod
    def _settings(config: RedConfig, key: str) -> tuple[RedConfig]:
        return (config,)
