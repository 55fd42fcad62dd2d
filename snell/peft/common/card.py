"""A line in the model card that PEFT writes, for those who meet the adapter without knowing its package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["add_import"]


def add_import(folder: str, module: str) -> None:
    """Say in the folder's model card, if there is one, that ``module`` must be imported before the adapter loads.

    PEFT alone knows no tuners but its own: without the import it raises ``KeyError`` with the tuner's name.
    """
    card, line = Path(folder) / "README.md", f"import {module}"
    if card.exists() and line not in (text := card.read_text()):
        card.write_text(
            f"{text.rstrip()}\n\n## Loading the adapter\n\nPEFT learns this tuner from its package:\n\n```python\n"
            f"{line}  # before PeftModel.from_pretrained\n```\n"
        )
