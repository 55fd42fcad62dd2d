"""A SNELL twin for each of the rows that PEFT's tests run with LoRA."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet
from peft import LoraConfig, PeftConfig

from snell.peft import SnellConfig

from .differences import LORA_ONLY

#: LoRA's settings by SNELL's names.
_RENAMED = {"lora_dropout": "dropout", "init_lora_weights": "init_weights"}
_HAS = {field.name for field in fields(SnellConfig)}

#: How many rows use each feature that SNELL does not have.
NOT_MIRRORED: Counter[str] = Counter()


class NotMirrored(Exception):
    """A row of LoRA's that uses a feature that SNELL does not have; ``args[0]`` is its name."""


def settings(lora: dict[str, Any]) -> dict[str, Any]:
    """SNELL's settings for LoRA's. Both start as the identity unless told otherwise; a layer may have 5 weights."""
    snell: dict[str, Any] = {"init_weights": "identity", "sparsity": 0.5}
    for name, value in lora.items():
        name = _RENAMED.get(name, name)
        if name == "init_weights" and not isinstance(value, bool):
            raise NotMirrored("init_lora_weights")
        if name == "init_weights":
            value = "identity" if value else False
        if name == "bias" and value == "lora_only":
            value = "snell_only"
        if name in _HAS:
            snell[name] = value
        elif name in LORA_ONLY:
            if value:
                raise NotMirrored(name)
        elif name not in ("lora_alpha", "alpha_pattern"):  # scale has their place
            raise KeyError(f"{name} of LoRA's: tests/peft_suite knows nothing of")
    return snell


def _config_of(value: Any) -> type | None:
    if inspect.isclass(value) and issubclass(value, PeftConfig):
        return value
    return type(value) if isinstance(value, PeftConfig) else None


def _twin(value: Any) -> Any:
    if value is LoraConfig:
        return SnellConfig
    if isinstance(value, LoraConfig):
        fresh = LoraConfig().to_dict()
        return SnellConfig(**settings({k: v for k, v in value.to_dict().items() if v != fresh.get(k) and k in _SET}))
    if isinstance(value, dict):
        return settings(value)
    return "snell" if value == "lora" else value


_SET = {field.name for field in fields(LoraConfig)} - {"peft_version", "peft_type", "runtime_config"}


def _cells(row: Any) -> tuple[Any, ...]:
    if isinstance(row, ParameterSet):
        return tuple(row.values)
    return row if isinstance(row, tuple) else (row,)


def rows(values: Iterable[Any]) -> Iterator[ParameterSet]:
    """LoRA's rows of a test's parameters and their twins, by ids that differ in the tuner's name alone."""
    for number, row in enumerate(values):
        cells = _cells(row)
        if {_config_of(cell) for cell in cells} - {None} != {LoraConfig}:
            continue
        try:
            twin = tuple(map(_twin, cells))
        except NotMirrored as missing:
            NOT_MIRRORED[missing.args[0]] += 1
            continue
        name = next((cell for cell in cells if isinstance(cell, str)), "")
        for tuner, row_of_it in (("LoRA", cells), ("SNELL", twin)):
            yield pytest.param(*row_of_it, marks=getattr(row, "marks", ()), id=f"{tuner}:{number} {name}".rstrip())


def has_tuner(values: Iterable[Any]) -> bool:
    """Whether any row names a tuner's configuration."""
    return any(_config_of(cell) is not None for row in values for cell in _cells(row))
