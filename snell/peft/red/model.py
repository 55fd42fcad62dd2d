"""Puts RED layers into a model, as PEFT asks of a tuner."""

from __future__ import annotations

from typing import Any

from snell.peft.common.model import TunerModel
from snell.peft.red.config import RedConfig
from snell.peft.red.layer import EditedLinear

__all__ = ["RedModel"]

#: The second linear layer of each feed-forward block, by model type: names of modules.
_FEED_FORWARD = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), "output.dense"),
    **dict.fromkeys(("vit", "deit"), "mlp.fc2"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "mlp.c_proj"),
    **dict.fromkeys(("t5", "mt5", "umt5"), "wo"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"), "down_proj"),
    **dict.fromkeys(("bart", "mbart", "opt", "phi"), "fc2"),
    **dict.fromkeys(("dinov2", "siglip_vision_model", "clip_vision_model"), "mlp.fc2"),
    "distilbert": "ffn.lin2",
    "gpt_neox": "mlp.dense_4h_to_h",
}

#: Where a feed-forward block's layer is named as attention's output projection is.
_ATTENTION = "attention.output.dense"


class RedModel(TunerModel):
    """A model whose target layers' outputs are edited; what ``get_peft_model`` builds for a :class:`RedConfig`.

    Args:
        model: the model to adapt; its parameters are frozen.
        peft_config: a :class:`RedConfig`, or several by adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded into.
    """

    prefix: str = "repr_"
    tuner_layer_cls = EditedLinear
    target_module_mapping: dict[str, Any] = {kind: [name] for kind, name in _FEED_FORWARD.items()}

    def _settings(self, config: RedConfig, key: str) -> tuple[RedConfig]:
        return (config,)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        default = peft_config.target_modules is None
        config: Any = super()._prepare_adapter_config(peft_config, model_config)
        if default and "output.dense" in config.target_modules:
            excluded = config.exclude_modules or set()
            if isinstance(excluded, str):
                config.exclude_modules = rf"{excluded}|.*{_ATTENTION}"
            else:
                config.exclude_modules = {*excluded, _ATTENTION}
        return config
