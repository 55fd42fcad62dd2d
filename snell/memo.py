"""tau once per parameter version: a memo keyed by what the factors hold, not by who holds them.

A version counter misses edits through ``.data``, a sharded parameter gathered into the same storage and
a replayed graph; the bytes miss nothing. Hashing (m + n) * r numbers costs a thousandth of selecting
among m * n.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

#: Layers of one model that keep their threshold; the least recently used goes first.
CAPACITY = 4096

_memo: OrderedDict[Hashable, Tensor] = OrderedDict()

#: What backends that remember on their own device do when everything is to be forgotten.
also_clear: list[Callable[[], None]] = []


def fingerprint(*tensors: Tensor) -> bytes:
    """A digest of what tensors in the computer's own memory hold."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.digest()


def clear() -> None:
    """Forget every threshold, so that the next call selects anew."""
    _memo.clear()
    for forget in also_clear:
        forget()


def remember(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """The threshold kept under ``key``, computed if there is none; always a fresh 0-dim tensor."""
    # Taken out and put back rather than moved: another thread may forget the key in between.
    tau = _memo.pop(key, None)
    if tau is None:
        tau = compute()
    _memo[key] = tau
    if len(_memo) > CAPACITY:
        _memo.popitem(last=False)
    return tau.clone()
