"""tau once per parameter version: a memo keyed by what the factors hold, not by who holds them.

A version counter misses edits through ``.data``, a sharded parameter gathered into the same storage and a replayed
graph. The bytes miss nothing. Hashing (m + n) r numbers costs a thousandth of selecting among m n.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

from snell import native

#: Layers of one model that keep their threshold; the least recently used goes first.
CAPACITY = 4096

_memo: OrderedDict[Hashable, Tensor] = OrderedDict()


def fingerprint(*tensors: Tensor) -> Hashable:
    """128 bits of what contiguous tensors in the computer's own memory hold."""
    if native.available():
        return native.fingerprint(*tensors)
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    return digest.digest()


def forget() -> None:
    """Forget every threshold."""
    _memo.clear()


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
