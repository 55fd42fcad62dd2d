"""The settings that say which modules of a model an adapter is for, the same for every tuner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from snell.peft.common.card import add_import

__all__ = ["TargetsConfig"]


@dataclass
class TargetsConfig(PeftConfig):
    """Fields that every tuner's configuration has; each tuner's own docstring describes them.

    Raises:
        ValueError: settings that exclude each other.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regular expression of the modules to adapt, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regular expression of modules to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt, where not all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list those indices count in."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Whether the targets store their weight [in, out]."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform cannot be used where target_modules is a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: the indices to adapt")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does; a model card that it has written there then says which import the adapter needs."""
        super().save_pretrained(save_directory, **kwargs)
        add_import(save_directory, "snell.peft")
