"""Writes what an adapter changes in its base model: the replaced entries alone, for a loader without this package."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor

from snell.peft.common import base
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.layer import AdaptedLinear

__all__ = ["export_sparse", "skips"]

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def skips(positions: Tensor) -> Tensor:
    """Ascending positions as uint8: b < 255 skips b entries and takes one; 255 skips 255 and takes none."""
    skipped = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    whole = skipped // 255
    ends = torch.cumsum(whole + 1, 0)
    coded = torch.full((int(ends[-1]) if len(ends) else 0,), 255, dtype=torch.uint8)
    coded[ends - 1] = (skipped % 255).to(torch.uint8)
    return coded


@torch.no_grad()
def export_sparse(model: PeftModel, path: str | PathLike, adapter_name: str = "default") -> int:
    """Write the entries of the base model's weights that merging an adapter replaces, and what replaces them.

    The file is in safetensors. Each adapted weight has two tensors: ``<weight>:skips``, uint8, the positions in
    row-major order as :func:`skips` codes them, and ``<weight>:values``, the new entries in the weight's dtype. What
    ``modules_to_save`` trained is there whole, as ``<parameter>:whole``. docs/peft.md has a loader.

    Args:
        model: a model with a SNELL adapter, unmerged. It is not changed.
        path: the file to write.
        adapter_name: the adapter.

    Returns:
        The size of the tensors in bytes.

    Raises:
        ValueError: no SNELL adapter has that name, something is merged, or the adapter trains the base's biases or
            single tokens.
        TypeError: an adapted weight is not a whole float matrix: it is quantised, or split over processes.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, SnellConfig):
        raise ValueError(f"adapter_name must be one of a SNELL adapter; got {adapter_name!r}")
    if config.bias != "none":
        raise ValueError(f"an adapter with bias={config.bias!r} cannot be exported: its biases are in the base model")
    tensors: dict[str, Tensor] = {}
    adapted: Any = model.base_model.model
    for name, module in adapted.named_modules():
        if isinstance(module, AdaptedLinear) and adapter_name in module.adapter_names:
            tensors |= _replaced(name.replace(".base_layer", "") + ".weight", module, adapter_name)
        elif isinstance(module, ModulesToSaveWrapper):
            if adapter_name in module.modules_to_save:
                state = module.modules_to_save[adapter_name].state_dict()
                tensors |= {f"{name}.{key}:whole": value.cpu().clone() for key, value in state.items()}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name} cannot be exported: it is a {type(module).__name__}")
    save_file(tensors, path, metadata={"format": "snell-sparse", "version": "1"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _replaced(key: str, layer: AdaptedLinear, adapter_name: str) -> dict[str, Tensor]:
    if layer.merged:
        raise ValueError(f"{key} has {layer.merged_adapters} merged: call unmerge_adapter() before exporting")
    inner: Any = layer.get_base_layer()
    matrix = base.float_weight(inner, layer.fan_in_fan_out)
    if matrix is None or base.split(inner, layer.fan_in_fan_out) is not None:
        raise TypeError(f"{key} cannot be exported: it is quantised or split over processes")
    before = inner.weight.detach()
    after = before.clone(memory_format=torch.contiguous_format)
    layer._change(adapter_name, matrix, True).put_in(after.T if layer.fan_in_fan_out else after)
    # By bits: what the loader leaves alone must be equal to what merging leaves, zeros' signs included.
    bits = _BITS[before.dtype]
    positions = (after.view(bits) != before.contiguous().view(bits)).flatten().nonzero()[:, 0].cpu()
    return {f"{key}:skips": skips(positions), f"{key}:values": after.flatten().cpu()[positions]}
