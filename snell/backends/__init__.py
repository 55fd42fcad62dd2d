"""Backends: modules with one function for each of the three block operations, registered by device.

``blocked`` (plain PyTorch) serves every device; ``cpu`` (native library) and ``triton`` take over where
they can run. The dispatcher picks; :func:`use` overrides it, for comparison and tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from snell import native
from snell.backends import blocked, cpu
from snell.ops import LIBRARY

OPERATIONS = ("select_threshold", "merge_out", "factor_grad")

#: Every backend this machine can run, by name.
AVAILABLE: dict[str, ModuleType] = {"blocked": blocked}


def _register(library: torch.library.Library, backend: ModuleType, key: str, allow_override: bool = False) -> None:
    for operation in OPERATIONS:
        library.impl(operation, getattr(backend, operation), key, allow_override=allow_override)


@contextmanager
def use(name: str, device_type: str = "cpu") -> Iterator[None]:
    """Route the operations on ``device_type`` to the backend ``name`` for the time of the context.

    Raises:
        ValueError: the backend is not available here.
    """
    if name not in AVAILABLE:
        raise ValueError(f"name must be an available backend, one of {', '.join(AVAILABLE)}; got {name!r}")
    library = torch.library.Library("snell", "IMPL")
    try:
        with warnings.catch_warnings():  # overriding is what this is for
            warnings.simplefilter("ignore")
            _register(library, AVAILABLE[name], device_type.upper(), allow_override=True)
        yield
    finally:
        library._destroy()


_register(LIBRARY, blocked, "CompositeExplicitAutograd")

if native.available():
    AVAILABLE["cpu"] = cpu
    _register(LIBRARY, cpu, "CPU")
