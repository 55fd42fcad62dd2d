"""Tuners whose targets are, unless named, the second linear layer of each feed-forward block."""

from __future__ import annotations

from typing import Any

from snell.peft.common.model import TunerModel

__all__ = ["FeedForwardModel"]

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


class FeedForwardModel(TunerModel):
    """A :class:`TunerModel` with these targets where the model's architecture is known."""

    target_module_mapping: dict[str, Any] = {kind: [name] for kind, name in _FEED_FORWARD.items()}

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
