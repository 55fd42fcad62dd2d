"""The native library: found, loaded and called through ctypes. csrc/api.h has its structures.

Tensors lie in the computer's own memory; factors are contiguous.
"""

from __future__ import annotations

import ctypes
import struct
import warnings
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from snell.spec import Spec
from snell.update import Activations, Gradients, Update

PATH = Path(__file__).with_name("_native.so")

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


#: Activations are padded to a multiple of this many tokens (SNELL_TOKENS).
TOKENS = 16


class _Update(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("m", "n", "rank")),
        *((name, c_void_p) for name in ("A", "B", "theta", "tau", "smooth_max")),
        *((name, c_int32) for name in ("dtype", "kernel", "groups", "gate", "threads", "of_rows")),
    ]


class _Matrix(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("dtype", c_int32)]


class _Tokens(Structure):
    _fields_ = [("grad_y", c_void_p), ("x", c_void_p), ("tokens", c_int64)]


class _Edit(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("tokens", "m")),
        *((name, c_void_p) for name in ("u", "grad", "scaling", "bias")),
        *((name, c_int32) for name in ("dtype", "vector_dtype", "threads")),
    ]


_NO_TOKENS = _Tokens()
_NO_MATRIX = _Matrix()


def _truncated() -> str | None:
    """What is missing of an ELF file's end. The loader maps such a file, and the process dies when it reads there."""
    with PATH.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return None
    # The table of sections stands last: its offset, and the size and number of its entries.
    (offset,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    held, whole = PATH.stat().st_size, offset + size * count
    return f"{PATH} is truncated: it holds {held} of {whole} bytes" if held < whole else None


def _declare(library: ctypes.CDLL) -> None:
    for names in (library.snell_isa, library.snell_kernel_functions, library.snell_gates):
        names.restype = c_char_p
    library.snell_merge.argtypes = [POINTER(_Update), POINTER(_Update), POINTER(_Matrix), POINTER(_Matrix)]
    library.snell_select.argtypes = [POINTER(_Update), c_int64, c_void_p]
    library.snell_density.argtypes = [POINTER(_Update), c_int64, POINTER(c_double)]
    library.snell_sample.argtypes = [POINTER(_Update), c_int64, c_int64, c_void_p]
    library.snell_within.argtypes = [POINTER(_Update), c_void_p, c_int64, c_void_p, POINTER(c_int64)]
    matrix = POINTER(_Matrix)
    gradients = [c_void_p] * 3
    updates = [POINTER(_Update)] * 2
    library.snell_factor_grad.argtypes = [*updates, matrix, POINTER(_Tokens), matrix, matrix, *gradients, c_void_p]
    library.snell_smooth_max.argtypes = [POINTER(_Update), c_void_p]
    library.snell_smooth_max_grad.argtypes = [POINTER(_Update), c_void_p, *gradients]
    library.snell_transpose.argtypes = [matrix, c_int64, c_int64, c_void_p, c_int32]
    library.snell_transpose.restype = None
    library.snell_edit.argtypes = [POINTER(_Edit), c_void_p]
    library.snell_edit_grad.argtypes = [POINTER(_Edit), *gradients]
    library.snell_fingerprint.argtypes = [c_int, POINTER(c_void_p), POINTER(c_int64), POINTER(c_uint64)]
    library.snell_fingerprint.restype = None


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if not PATH.exists():
        return None, "was not built (no C++ compiler at installation?)"
    try:
        if truncated := _truncated():
            return None, f"does not load: {truncated}"
        library = ctypes.CDLL(str(PATH))
        _declare(library)
    except OSError as error:
        return None, f"does not load: {error}"
    except AttributeError as error:
        return None, f"is not of this version: {error}"
    return library, None


def _positions(names: bytes) -> dict[str, int]:
    return {name: position for position, name in enumerate(names.decode().split(","))}


_library, _problem = _load()
_KERNELS = _positions(_library.snell_kernel_functions()) if _library else {}
_GATES = _positions(_library.snell_gates()) if _library else {}
if _problem:
    warnings.warn(f"snell's native library {_problem}; layers on the CPU use the slower PyTorch backend", stacklevel=2)


def available() -> bool:
    """Whether the native library is loaded."""
    return _library is not None


def problem() -> str | None:
    """Why the native library is not loaded, as the end of a sentence that begins with its name; None where it is."""
    return _problem


def instruction_set() -> str | None:
    """``v4`` (AVX-512), ``v3`` (AVX2) or ``base``; None without the library. SNELL_ISA asks for a lesser one."""
    return _library.snell_isa().decode() if _library else None


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not address and tensor.numel():  # a piece of a split weight may be empty
        raise TypeError(f"a {type(tensor).__name__} holds no memory of its own that a native kernel could read")
    return address


def _struct(
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor | None,
    spec: Spec,
    smooth_max: Tensor | None = None,
    of_rows: bool = False,
) -> _Update:
    return _Update(
        B.shape[0],
        A.shape[0],
        A.shape[1],
        _address(A),
        _address(B),
        theta.data_ptr(),  # empty for a kernel function without parameters
        None if tau is None else _address(tau),
        None if smooth_max is None else _address(smooth_max),
        _DTYPES[A.dtype],
        _KERNELS[spec.kernel],
        spec.groups,
        _GATES[spec.gate],
        torch.get_num_threads(),
        of_rows,
    )


def _of_update(update: Update) -> _Update:
    return _struct(*update[:5], update.smooth_max, update.of_rows)


def _structs(update: Update) -> tuple:
    """The update and its start, by reference."""
    return byref(_of_update(update)), None if update.start is None else byref(_of_update(update.start))


def _matrix(matrix: Tensor | None) -> _Matrix:
    return _NO_MATRIX if matrix is None else _Matrix(_address(matrix), matrix.stride(0), _DTYPES[matrix.dtype])


def _check(status: int) -> None:
    if status:
        raise MemoryError("snell's native library could not allocate its workspace")


def select(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, k: int, smooth_max: Tensor | None = None) -> Tensor:
    """The k-th smallest \\|K\\| (k from 1)."""
    assert _library is not None
    tau = A.new_empty(())
    _check(_library.snell_select(byref(_struct(A, B, theta, None, spec, smooth_max)), k, tau.data_ptr()))
    return tau


def smooth_max(A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Tensor:
    """The smooth maximum of each column of the K under the softmax."""
    assert _library is not None
    out = A.new_empty(A.shape[0])
    _check(_library.snell_smooth_max(byref(_struct(A, B, theta, None, spec)), _address(out)))
    return out


def smooth_max_grad(grad: Tensor, update: Update, grads: Gradients) -> None:
    """Add to the gradients of A, B and gamma, contiguous, from that of the update's smooth maxima."""
    assert _library is not None
    addresses = (t.data_ptr() for t in (grad, grads.A, grads.B, grads.theta[-1]))
    _check(_library.snell_smooth_max_grad(byref(_of_update(update)), *addresses))


def merge(update: Update, weight: Tensor | None, out: Tensor) -> None:
    """dW or weight + dW into ``out``; rows of both contiguous, strides between rows free."""
    assert _library is not None
    _check(_library.snell_merge(*_structs(update), byref(_matrix(weight)), byref(_matrix(out))))


def factor_grad(
    update: Update, grads: Gradients, G: Tensor | Activations, weight: Tensor | None, merged: Tensor | None
) -> None:
    """Add to the gradients, contiguous and of the factors' dtype; write weight + dW into ``merged``.

    From activations, G is computed for survivors only.
    """
    assert _library is not None
    if isinstance(G, Activations):
        source, tokens = _NO_MATRIX, _Tokens(G.grad_y.data_ptr(), G.x.data_ptr(), G.x.shape[1])
    else:
        source, tokens = _matrix(G), _NO_TOKENS
    out = source if merged is G else _matrix(merged)
    inputs = *_structs(update), byref(source), byref(tokens), byref(_matrix(weight)), byref(out)
    addresses = (None if grad is None else grad.data_ptr() for grad in grads)
    _check(_library.snell_factor_grad(*inputs, *addresses))


def activations(grad_y: Tensor, x: Tensor) -> Activations:
    """Those of ``grad_y [T, m]`` and ``x [T, n]``, of the factors' dtype."""
    return Activations(_transposed(grad_y), _transposed(x))


def _transposed(matrix: Tensor) -> Tensor:
    # torch's own transposing copy takes two to four times as long.
    assert _library is not None
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    rows, columns = matrix.shape
    out = matrix.new_empty(columns, -(-rows // TOKENS) * TOKENS)
    _library.snell_transpose(byref(_matrix(matrix)), rows, columns, _address(out), torch.get_num_threads())
    return out


def _edit(u: Tensor | None, grad: Tensor | None, scaling: Tensor, bias: Tensor | None) -> _Edit:
    lead = u if grad is None else grad
    assert lead is not None
    tensors = (None if tensor is None else _address(tensor) for tensor in (u, grad, scaling, bias))
    return _Edit(*lead.shape, *tensors, _DTYPES[lead.dtype], _DTYPES[scaling.dtype], torch.get_num_threads())


def edit(u: Tensor, scaling: Tensor, bias: Tensor, z: Tensor) -> None:
    """``scaling * u + bias`` into ``z``, ``[tokens, m]`` of one dtype as u is; all contiguous."""
    assert _library is not None
    _check(_library.snell_edit(byref(_edit(u, None, scaling, bias)), _address(z)))


def edit_grad(grad: Tensor, u: Tensor | None, scaling: Tensor, into: tuple[Tensor | None, ...]) -> None:
    """The gradients of u, scaling and bias into three tensors, None where one is not wanted; all contiguous."""
    assert _library is not None
    addresses = (None if tensor is None else _address(tensor) for tensor in into)
    _check(_library.snell_edit_grad(byref(_edit(u, grad, scaling, None)), *addresses))


def sample(update: Update, first: int, out: Tensor) -> None:
    """\\|K\\| of entries ``first`` to ``first + len(out)`` of an endless random sample, into ``out``."""
    assert _library is not None
    _check(_library.snell_sample(byref(_of_update(update)), first, first + len(out), _address(out)))


def within(update: Update, bounds: Tensor, out: Tensor) -> tuple[int, int]:
    """How many \\|K\\| are below the bounds ``[2]``, and how many within, which ``out`` gets if it has room for all."""
    assert _library is not None
    counts = (c_int64 * 2)()
    _check(_library.snell_within(byref(_of_update(update)), _address(bounds), len(out), _address(out), counts))
    return counts[0], counts[1]


def density(update: Update, samples: int) -> float:
    """The share of entries that survive, estimated from ``samples`` random ones, the same every time."""
    assert _library is not None
    share = c_double()
    _check(_library.snell_density(byref(_of_update(update)), samples, byref(share)))
    return share.value


def fingerprint(*tensors: Tensor) -> tuple[int, int]:
    """128 bits of the tensors' bytes."""
    assert _library is not None
    count, digest = len(tensors), (c_uint64 * 2)()
    data = (c_void_p * count)(*(t.data_ptr() for t in tensors))
    _library.snell_fingerprint(count, data, (c_int64 * count)(*(t.nbytes for t in tensors)), digest)
    return digest[0], digest[1]
