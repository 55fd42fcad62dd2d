"""Select in CUDA C++ (``csrc/cuda/``) in place of Triton's kernels: one call from the host issues all its launches.

Off unless SNELL_CUDA_SELECT=1 is in the environment, or inside :func:`use`. The library is built where ``nvcc`` is at
installation. It computes K directly, with the instructions of ``kappa.direct_statistic`` in the same order: tau has the
bits that Triton's select finds, and both share state and memo.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from snell import spec

#: Beside the native library.
PATH = Path(spec.__file__).with_name("_cuda.so")

#: Positions are those of ``Kernel`` in csrc/cuda/kappa.cuh.
KERNELS = ("piecewise_linear", "linear", "sigmoid", "rbf", "mixture")


class Selection(Structure):
    """SnellSelect of csrc/cuda/api.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("factors", "theta", "smooth_max", "state", "memo", "sample", "buckets", "tau")),
        *((name, c_int64) for name in ("stride", "m", "n", "k", "salt")),
        *((name, c_int32) for name in ("layers", "rank", "groups", "kernel", "num_theta", "samples", "room")),
        *((name, c_int32) for name in ("low", "high", "bins", "bucket", "programs", "passes")),
    ]


def load(path: Path) -> ctypes.CDLL:
    """The library at ``path``. Raises OSError or AttributeError if it does not load, or is of another version."""
    library = ctypes.CDLL(str(path))
    library.snell_cuda_select.argtypes = [POINTER(Selection), c_void_p]
    library.snell_cuda_error.argtypes, library.snell_cuda_error.restype = [c_int], c_char_p
    return library


def _find() -> tuple[ctypes.CDLL | None, str | None]:
    if not PATH.exists():
        return None, "was not built (no nvcc at installation?)"
    try:
        return load(PATH), None
    except (OSError, AttributeError) as error:
        return None, f"does not load: {error}"


_library, _problem = _find()
_enabled = os.environ.get("SNELL_CUDA_SELECT") == "1"
if _enabled and _library is None:
    warnings.warn(f"SNELL_CUDA_SELECT=1 has no effect: snell's CUDA library {_problem}", stacklevel=2)


def problem() -> str | None:
    """Why the library is not loaded, as the end of a sentence that begins with its name; None where it is."""
    return _problem


def serves(device: torch.device, kernel: str) -> bool:
    """Whether the library selects by this kernel function for tensors of ``device``, a GPU: it is loaded and on."""
    # The tests' library runs the same kernels on the CPU.
    emulated = hasattr(_library, "snell_emulate")
    return _enabled and kernel in KERNELS and _library is not None and device.type == ("cpu" if emulated else "cuda")


@contextmanager
def use(on: bool) -> Iterator[None]:
    """Select with the library, or without it, inside the context.

    Raises:
        RuntimeError: there is no library to switch on.
    """
    global _enabled
    if on and _library is None:
        raise RuntimeError(f"select in CUDA C++ needs snell's CUDA library, which {_problem}")
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def select(device: torch.device, **numbers: Any) -> None:
    """Issue a selection on the device's current stream. ``numbers`` are the fields of :class:`Selection`.

    Raises:
        RuntimeError: a launch failed.
    """
    assert _library is not None
    addresses = {name: one.data_ptr() if isinstance(one, torch.Tensor) else one for name, one in numbers.items()}
    selection = Selection(**addresses)
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = _library.snell_cuda_select(byref(selection), torch.cuda.current_stream().cuda_stream)
    else:
        status = _library.snell_cuda_select(byref(selection), None)
    if status:
        raise RuntimeError(f"select in CUDA C++ failed: {_library.snell_cuda_error(status).decode()}")
