"""How to install what an optional part of snell needs.

The hints name the packages themselves, as snell is in no registry: they work beside a clone and beside a wheel.
"""

from __future__ import annotations

import importlib.metadata
import re


def hint(extra: str) -> str:
    """The command that installs what an extra asks for, as ``pip install 'peft>=0.20' 'transformers>=5.17'``.

    Args:
        extra: one of the names under ``project.optional-dependencies`` in pyproject.toml.

    Raises:
        ValueError: no such extra.
    """
    requirements = _requirements(extra)
    if not requirements:
        raise ValueError(f"extra must be one that snell declares; got {extra!r}")
    return f"pip install {' '.join(repr(requirement) for requirement in requirements)}"


def _requirements(extra: str) -> list[str]:
    # Not by the package packaging: it comes with some of the extras that are asked for here.
    found = []
    for line in importlib.metadata.requires("snell") or ():
        requirement, _, marker = line.partition(";")
        if f'extra == "{extra}"' not in marker:
            continue
        another = re.fullmatch(r"snell\[(.+)\]", requirement.strip())
        found += _requirements(another[1]) if another else [requirement.strip()]
    return found
