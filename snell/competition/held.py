"""Thresholds selected for many layers together. They are used until the parameters change."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snell.backends.base import Backend
from snell.spec import Spec
from snell.update import Parameters

__all__ = ["held", "hold"]


class _Held(NamedTuple):
    """A threshold selected together with others, and the state of the parameters it belongs to."""

    tensors: tuple[weakref.ref, ...]
    setting: tuple
    tau: Tensor
    fingerprint: Tensor


#: By the identity of A.
_held: dict[int, _Held] = {}


def _setting(A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> tuple:
    """What the host can compare: versions, addresses, stream, whether it is being captured, and settings."""
    versions = tuple(-1 if t.is_inference() else t._version for t in (A, B, theta))
    addresses = A.data_ptr(), B.data_ptr(), theta.data_ptr()
    place = None
    if A.is_cuda:
        place = torch.cuda.current_stream(A.device).cuda_stream, torch.cuda.is_current_stream_capturing()
    return versions, addresses, place, spec.sparsity, spec.kernel, spec.groups


def held(backend: Backend, A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Tensor | None:
    """The threshold held for these parameters, verified on the device; None if the host sees that they have changed.

    The host cannot see some changes: a replayed CUDA graph, an optimizer that writes through raw pointers, ``.data``.
    The device finds these by a hash of the parameters. tau is then NaN, and so is everything computed from it.
    """
    found = _held.get(id(A))
    if (
        found is None
        or any(tensor() is not t for tensor, t in zip(found.tensors, (A, B, theta), strict=True))
        or found.setting != _setting(A, B, theta, spec)
    ):
        return None
    return backend.verify(A, B, theta, found.tau, found.fingerprint)


def hold(backend: Backend, layers: Sequence[Parameters]) -> bool:
    """Select for all layers in shared launches and hold the thresholds. False if the backend cannot."""
    selected = backend.select_together(layers)
    if selected is None:
        return False
    for key in [key for key, found in _held.items() if any(tensor() is None for tensor in found.tensors)]:
        del _held[key]
    for (A, B, theta, spec), tau, fingerprint in zip(layers, *selected, strict=True):
        tensors = tuple(weakref.ref(t) for t in (A, B, theta))
        _held[id(A)] = _Held(tensors, _setting(A, B, theta, spec), tau, fingerprint)
    return True


def forget() -> None:
    """Forget every held threshold."""
    _held.clear()
