"""Remembers thresholds on the host, by a hash of the factors' content.

A version counter would miss edits through ``.data``, a sharded parameter gathered into the same storage, and a replayed
graph. A hash of the content misses none of these. Hashing (m + n) r numbers costs about a thousandth of selecting among
m n entries.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

from snell import native

#: Most thresholds remembered. The least recently used is forgotten first.
CAPACITY = 4096

#: The same for results of many numbers.
PLACES = 1024

_memo: OrderedDict[Hashable, Tensor] = OrderedDict()
_places: OrderedDict[Hashable, tuple[Hashable, Tensor]] = OrderedDict()


def fingerprint(*tensors: Tensor) -> Hashable:
    """A 128-bit hash of the content of contiguous CPU tensors."""
    if native.available():
        return native.fingerprint(*tensors)
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    return digest.digest()


def forget() -> None:
    """Forget every threshold."""
    _memo.clear()
    _places.clear()


def remember(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """The threshold stored under ``key``, computed if there is none; always a new 0-dim tensor."""
    # pop and reinsert instead of move_to_end, which raises if another thread has removed the key meanwhile.
    tau = _memo.pop(key, None)
    if tau is None:
        tau = compute()
    _memo[key] = tau
    if len(_memo) > CAPACITY:
        _memo.popitem(last=False)
    return tau.clone()


def remember_at(place: Hashable, content: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """What was computed from this content; always a new tensor. Each place keeps the newest alone: it may be large."""
    held = _places.pop(place, None)
    if held is None or held[0] != content:
        held = content, compute()
    _places[place] = held
    if len(_places) > PLACES:
        _places.popitem(last=False)
    return held[1].clone()
