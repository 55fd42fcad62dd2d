"""Backends: modules with one function for each of the three block operations, registered by device.

``blocked`` (plain PyTorch) serves every device; ``cpu`` (native library) and ``triton`` take over where
they can run. The dispatcher picks; :func:`use` overrides it, for comparison and tests.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from snell import native, schedule
from snell.backends import blocked, cpu
from snell.ops import LIBRARY

OPERATIONS = ("select_threshold", "merge_out", "factor_grad")

#: Every backend this machine can run, by name.
AVAILABLE: dict[str, ModuleType] = {"blocked": blocked}


def _register(library: torch.library.Library, backend: ModuleType, device_type: str, override: bool = False) -> None:
    key = device_type.upper() or "CompositeExplicitAutograd"
    for operation in OPERATIONS:
        library.impl(operation, getattr(backend, operation), key, allow_override=override)
    schedule.BACKENDS[device_type] = backend


@contextmanager
def use(name: str, device_type: str = "cpu") -> Iterator[None]:
    """Route the operations on ``device_type`` to the backend ``name`` for the time of the context.

    Raises:
        ValueError: the backend is not available here.
    """
    if name not in AVAILABLE:
        raise ValueError(f"name must be an available backend, one of {', '.join(AVAILABLE)}; got {name!r}")
    library, before = torch.library.Library("snell", "IMPL"), dict(schedule.BACKENDS)
    try:
        with warnings.catch_warnings():  # overriding is what this is for
            warnings.simplefilter("ignore")
            _register(library, AVAILABLE[name], device_type, override=True)
        yield
    finally:
        library._destroy()
        schedule.BACKENDS.clear()
        schedule.BACKENDS.update(before)


_register(LIBRARY, blocked, "")

if native.available():
    AVAILABLE["cpu"] = cpu
    _register(LIBRARY, cpu, "cpu")

# With TRITON_INTERPRET=1 the kernels run on CPU tensors, in Python: slow, but the kernels' own arithmetic.
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") and (torch.version.cuda or _interpreted):
    from snell.backends import triton

    _register(LIBRARY, triton, "cuda")
    if _interpreted or torch.cuda.is_available():
        AVAILABLE["triton"] = triton
