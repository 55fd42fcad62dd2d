"""Puts another adapter's factors into a model in place, as PEFT's ``hotswap_adapter`` does for LoRA alone."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn

from snell.peft.common import checkpoint
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.layer import AdaptedLinear
from snell.peft.snell.model import SnellModel

__all__ = ["hotswap_adapter", "hotswap_adapter_from_state_dict"]

#: Settings that are part of what the layers compute, or compile to. Ranks show in the factors' shapes.
_EQUAL = ("sparsity", "sparsity_pattern", "competition", "kernel", "groups", "gate", "scale", "trains_theta", "dropout")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """``peft.utils.hotswap.hotswap_adapter`` for SNELL: a saved adapter takes the place of a loaded one.

    Factors are written in place, so that a compiled model keeps its graphs. The new adapter has the old one's name and
    layers, ranks and settings. Its own sparsities (from a :class:`~snell.training.SparsityBudget`) are taken too; a
    compiled model then compiles again.

    Args:
        model: a model with a SNELL adapter, compiled or not.
        model_name_or_path: of the new adapter.
        adapter_name: of the adapter that is replaced; the name stays.
        torch_device: where the file is loaded to before it is copied. None: the CPU.
        kwargs: of ``PeftConfig.from_pretrained`` and ``peft.utils.load_peft_weights``, such as ``subfolder``.

    Raises:
        ValueError, RuntimeError: as :func:`hotswap_adapter_from_state_dict`; nothing is changed then.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    if not isinstance(config, SnellConfig):
        raise ValueError(f"{model_name_or_path} must hold a SNELL adapter; it holds one of type {config.peft_type}")
    state_dict = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    whole = getattr(model, "_orig_mod", model)
    state_dict = SnellModel._remap_adapter_state_dict_for_load(whole, config, adapter_name, state_dict)
    hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: SnellConfig
) -> None:
    """Likewise from a state dict, whose keys are the model's own, with the adapter's name in them.

    Raises:
        ValueError: the adapter is not there or merged; settings or ranks differ; values are not finite.
        RuntimeError: the tensors are not those of the old adapter. A SNELL layer whose factors are missing is not 0.
    """
    model = getattr(model, "_orig_mod", model)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLinear) and adapter_name in layer.adapter_names
    }
    old: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if not layers or not isinstance(old, SnellConfig):
        raise ValueError(f"adapter_name must be one of a SNELL adapter; got {adapter_name!r}")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"{adapter_name!r} is merged: call unmerge_adapter() before another takes its place")
    _check_settings(old, config)
    sparsities = {name: f"{name}.snell_sparsity.{adapter_name}.weight" for name in layers}
    factors = {
        f"{name}.{factor}.{adapter_name}.weight": getattr(layer, factor)[adapter_name].weight
        for name, layer in layers.items()
        for factor in layer.adapter_layer_names
        if adapter_name in getattr(layer, factor)
    }
    given = state_dict.keys() - set(sparsities.values())
    if given != factors.keys():
        unexpected, missing = sorted(given - factors.keys()), sorted(factors.keys() - given)
        raise RuntimeError(f"the adapters' tensors differ: unexpected {unexpected}, missing {missing}")
    for key, factor in factors.items():
        if state_dict[key].shape != factor.shape:
            shapes = f"{list(state_dict[key].shape)} in place of {list(factor.shape)}"
            raise ValueError(f"{key} is {shapes}: adapters of other ranks cannot be swapped in; load it by itself")
    for name, layer in layers.items():
        for message in checkpoint.not_finite(layer, state_dict, f"{name}."):
            raise ValueError(message)

    for key, factor in factors.items():
        factor.copy_(state_dict[key])
    for name, layer in layers.items():
        own = state_dict.get(sparsities[name])
        if own is not None:
            layer.set_sparsity(adapter_name, own.item())
        elif adapter_name in layer._own_sparsity:
            layer.set_sparsity(adapter_name, config.spec_of(name.removeprefix("base_model.model.")).sparsity)
            del layer._own_sparsity[adapter_name]


def _check_settings(old: SnellConfig, new: SnellConfig) -> None:
    for config in (old, new):
        beside = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name)]
        if beside or config.bias != "none":
            raise ValueError(f"{(beside or ['bias'])[0]} must be unset: only factors can be swapped; load it by itself")
    for name in _EQUAL:
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"{name} must be that of the adapter in place, {getattr(old, name)!r}; got {getattr(new, name)!r}: "
                "load it by itself"
            )
    starts = [(config.init_seed if config.init_weights == "identity" else None) for config in (old, new)]
    if starts[0] != starts[1]:
        raise ValueError(
            "init_weights and init_seed must give the start of the adapter in place, which is subtracted from its "
            f"update; got init_weights={new.init_weights!r} and init_seed={new.init_seed}"
        )
