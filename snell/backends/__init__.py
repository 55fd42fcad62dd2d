"""Backends: implementations of the block operations, chosen by type of device.

``blocked`` (plain PyTorch) serves every device and dtype. ``cpu`` (the native library) and ``triton`` replace it where
they can run. :func:`use` selects another one, for comparisons and tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from snell import native
from snell.backends.base import Backend
from snell.backends.blocked import BlockedBackend
from snell.backends.cpu import CpuBackend

__all__ = ["AVAILABLE", "Backend", "of", "serving", "use"]

_BLOCKED = BlockedBackend()

#: Every backend that this machine can run, by name.
AVAILABLE: dict[str, Backend] = {"blocked": _BLOCKED}

#: The backend of a type of device; ``blocked`` serves the others.
_SERVING: dict[str, Backend] = {}


def serving(device_type: str) -> Backend:
    """The backend that serves float32 factors on this type of device."""
    return _SERVING.get(device_type, _BLOCKED)


def of(factor: Tensor) -> Backend:
    """The backend for the device and dtype of this factor."""
    backend = _SERVING.get(factor.device.type, _BLOCKED)
    return backend if factor.dtype in backend.dtypes else _BLOCKED


@contextmanager
def use(name: str, device_type: str = "cpu") -> Iterator[None]:
    """Let the backend ``name`` serve ``device_type`` inside the context.

    Raises:
        ValueError: the backend is not available on this machine.
    """
    if name not in AVAILABLE:
        raise ValueError(f"name must be an available backend, one of {', '.join(AVAILABLE)}; got {name!r}")
    before = serving(device_type)
    _SERVING[device_type] = AVAILABLE[name]
    try:
        yield
    finally:
        _SERVING[device_type] = before


if native.available():
    AVAILABLE["cpu"] = _SERVING["cpu"] = CpuBackend()

# With TRITON_INTERPRET=1 the kernels run on CPU tensors in Python: slowly, but with the kernels' own arithmetic.
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") and (torch.version.cuda or _interpreted):
    from snell.backends.triton import TritonBackend

    _SERVING["cuda"] = TritonBackend()
    if _interpreted or torch.cuda.is_available():
        AVAILABLE["triton"] = _SERVING["cuda"]
