"""Norms of a base model's weights, which are read block by block from its safetensors files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from snell.blocks import block_length


class BaseWeights:
    """A checkpoint of transformers: a folder, or the name of a model in the local Hugging Face cache.

    Raises:
        click.ClickException: there is no such checkpoint, or it holds no safetensors, or they cannot be read.
    """

    def __init__(self, name: str) -> None:
        self.folder = Path(name)
        if not self.folder.is_dir():
            try:
                self.folder = Path(snapshot_download(name, local_files_only=True))
            except (HFValidationError, LocalEntryNotFoundError) as error:
                raise click.ClickException(
                    f"{name} is neither a folder nor a model in the local Hugging Face cache; "
                    f"fetch a model with: hf download NAME"
                ) from error
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise click.ClickException(f"{self.folder} holds no safetensors file of a base model")
        self._files = {key: file for file in files for key in sorted(self._open(file).keys())}

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise click.ClickException(f"{file} cannot be read: {error}") from error

    def norm(self, module: str, out_features: int, in_features: int) -> float | None:
        """The weight's Frobenius norm; None where the checkpoint has no float weight for the module.

        Raises:
            click.ClickException: the weight's shape is not that of the layer.
        """
        key = self._key(module)
        if key is None:
            return None
        with self._open(self._files[key]) as file:
            weight = file.get_slice(key)
            shape = weight.get_shape()
            # Conv1D's weights are stored [in, out].
            if shape not in ([out_features, in_features], [in_features, out_features]):
                raise click.ClickException(
                    f"{module} is {out_features} x {in_features} in the adapter, but {key} of {self.folder} is "
                    f"{' x '.join(map(str, shape))}: the adapter belongs to another base model"
                )
            if not weight.get_dtype().startswith(("F", "BF")) or "8" in weight.get_dtype():
                return None
            length = block_length(shape[1] * 8, shape[0])
            blocks = (weight[start : start + length] for start in range(0, shape[0], length))
            return math.sqrt(sum(block.double().square().sum().item() for block in blocks))

    def _key(self, module: str) -> str | None:
        """The key of a module's weight, whose name may differ by a prefix or by how transformers saves it; or None."""
        for names in (self._modules, self._renamed):
            if found := _match(module, names):
                return found
        return None

    @cached_property
    def _modules(self) -> dict[str, str]:
        return {key.removesuffix(".weight"): key for key in self._files if key.endswith(".weight")}

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Keys by the names of the model's modules, where transformers saves weights under other names."""
        return {new.removesuffix(".weight"): key for key, new in _renamings(self.folder, list(self._files))}


def _match(module: str, names: dict[str, str]) -> str | None:
    if module in names:
        return names[module]
    # With a head on the base, or without it, one name is the other with a prefix.
    longer = [name for name in names if name.endswith(f".{module}")]
    if len(longer) == 1:
        return names[longer[0]]
    parts = module.split(".")
    return next((names[end] for i in range(1, len(parts) - 1) if (end := ".".join(parts[i:])) in names), None)


def _renamings(folder: Path, keys: list[str]) -> Iterator[tuple[str, str]]:
    """Keys of the checkpoint, and their names in the model that transformers builds, where it knows the model."""
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        with torch.device("meta"):
            model = getattr(transformers, architecture)(transformers.AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError):
        return  # not a model of transformers, or a release without these functions
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    held = model.state_dict()
    found = {key: rename_source_key(key, renamings, converters, model.base_model_prefix, held)[0] for key in keys}
    # Several keys with one name are parts of a fused weight.
    times = Counter(found.values())
    yield from ((key, new) for key, new in found.items() if times[new] == 1 and new.endswith(".weight"))
