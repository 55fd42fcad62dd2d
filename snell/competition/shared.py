"""One threshold over the updates of several layers, exact and without any matrix.

Layers compete by ``x = |K| / scale``, computed in float64, with a scale for each layer. The layers' own thresholds
follow from the common one, and K keeps its bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snell import backends
from snell.backends.base import Backend
from snell.competition import columns, radix
from snell.spec import Spec
from snell.update import Parameters, Update

__all__ = ["select_shared"]

#: Up to this many entries all are gathered: a sample would cost more.
GATHER_ALL = 2**15

#: Most numbers of a sample, and of the entries gathered, while these suffice: 40 MiB of float32. Over more than about
#: 10^10 entries more are gathered.
ROOM = 10 * 2**20

#: Room for gathered entries over the number expected, and at least.
SLACK, LEAST_ROOM = 1.2, 2**16

#: Entries of K in a tile where all are counted.
TILE = 2**18


class _Layer(NamedTuple):
    """K as an ungated update in the layout that the backend reads, and 1 / scale."""

    backend: Backend
    K: Update
    weight: float

    @property
    def size(self) -> int:
        return math.prod(self.K.shape)

    def tiles(self) -> Iterator[Tensor]:
        """x of all entries, in float64, some rows at a time."""
        m, n = self.K.shape
        # On an accelerator a tile of a CPU's cache would be a launch too short.
        rows = max((TILE if self.K.A.device.type == "cpu" else 64 * TILE) // n, 1)
        out = self.K.A.new_empty(min(rows, m), n)
        for block in self.K.split(rows, 0):
            tile = out[: block.shape[0]]
            self.backend.merge(block, None, tile)
            yield tile.double().mul_(self.weight)

    def threshold(self, x: Tensor) -> Tensor:
        """The largest number v of K's dtype with ``v / scale <= x`` as computed, for ``x [...]`` in float64."""
        found = (x / self.weight).to(self.K.A.dtype)
        # Rounding leaves it a step or two away.
        for _ in range(2):
            found = torch.where(found.double() * self.weight > x, found.nextafter(torch.zeros_like(found)), found)
        for _ in range(2):
            above = found.nextafter(torch.full_like(found, torch.inf))
            found = torch.where(above.double() * self.weight <= x, above, found)
        return found


@torch.no_grad()
def select_shared(layers: Sequence[Parameters], sparsity: float, scales: Sequence[float]) -> list[Tensor]:
    """Each layer's threshold, so that all layers together zero the ``ceil(sparsity * entries)`` entries of smallest x.

    Entries of equal x survive or fall together, as in a layer by itself. Any share of a layer may survive, also none.

    Args:
        layers: A, B, theta and settings of each, already checked, on one device and of one dtype. The settings'
            sparsities have no meaning here.
        sparsity: share of all entries that are set to 0, in (0, 1).
        scales: of each layer, above 0 and finite.

    Returns:
        New 0-dim tensors of A's dtype, by layer; NaN if so few entries are numbers.

    Raises:
        ValueError: devices or dtypes that differ, a scale or sparsity out of range, or no layer.
    """
    if not layers or len({(A.device, A.dtype) for A, *_ in layers}) > 1:
        found = sorted({f"{A.dtype} on {A.device}" for A, *_ in layers})
        raise ValueError(f"layers under one threshold must have one dtype and device; got {', '.join(found) or 'none'}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must lie in (0, 1) for one threshold over layers; got {sparsity}")
    if wrong := [scale for scale in scales if not 0 < scale < math.inf]:
        raise ValueError(f"scales must be finite numbers above 0; got {wrong[0]}")
    ready = [_ready(layer, 1 / scale) for layer, scale in zip(layers, scales, strict=True)]
    k = math.ceil(sparsity * sum(layer.size for layer in ready))
    x = _gathered(ready, k)
    if x is None:
        like = layers[0][0].new_empty((), dtype=torch.float64)
        x = radix.smallest(k, lambda: itertools.chain.from_iterable(layer.tiles() for layer in ready), like)
    return [layer.threshold(x) for layer in ready]


def _ready(parameters: Parameters, weight: float) -> _Layer:
    A, B, theta, spec = parameters[0].detach(), parameters[1].detach(), parameters[2].detach(), parameters[3]
    maxima = None if spec.function.softmax_of is None else columns.smooth_max(A, B, theta, spec)
    ungated = Spec(spec.rank, 0.0, spec.kernel, spec.groups).applied
    backend = backends.of(A)
    return _Layer(backend, backend.prepare(Update(A, B, theta, A.new_zeros(()), ungated, smooth_max=maxima)), weight)


def _gathered(layers: Sequence[_Layer], k: int) -> Tensor | None:
    """The k-th smallest x (k from 1) from one pass; None if the backend cannot, or a sample's bracket missed it.

    As in ``csrc/cpu/select.cpp``, a sample brackets it to four standard deviations on either side.
    """
    bracket = _bracket(layers, k)
    if bracket is None:
        return None
    ends, expected = bracket
    values = layers[0].K.A.new_empty(LEAST_ROOM + int(SLACK * expected))
    below, used, parts = 0, 0, []
    for layer in layers:
        low, high = layer.threshold(ends)
        low = low.nextafter(ends.new_tensor(math.inf).to(low.dtype)) if ends[0] > 0 else torch.zeros_like(low)
        under, inside = layer.backend.within(layer.K, torch.stack([low, high]), values[used:])
        if used + inside > len(values):
            return None
        parts.append((values[used : used + inside], layer.weight))
        below, used = below + under, used + inside
    if not 0 < k - below <= used:
        return None
    pieces = [(piece, weight) for part, weight in parts for piece in part.split(TILE)]
    return radix.smallest(k - below, lambda: (piece.double() * weight for piece, weight in pieces), ends)


def _bracket(layers: Sequence[_Layer], k: int) -> tuple[Tensor, float] | None:
    """``[2]``: two x, of which the first is outside unless it is 0, and how many entries are expected inside."""
    entries = sum(layer.size for layer in layers)
    q = k / entries
    spread = math.sqrt(q * (1 - q))
    # As many as balance their cost and that of what is gathered, and so many that there is room for it.
    size = int(max((0.4 * entries) ** (2 / 3), (8 * SLACK * spread * entries / ROOM) ** 2))
    size = min(size, ROOM) if entries > GATHER_ALL else 0
    sample, before = layers[0].K.A.new_empty(size), 0
    for layer in layers:
        first, last = before * size // entries, (before + layer.size) * size // entries
        if not layer.backend.sample(layer.K, first, sample[first:last]):
            return None
        sample[first:last] *= layer.weight
        before += layer.size
    ends, share = [0.0, math.inf], 1.0
    if size:
        margin = 4 * spread / math.sqrt(size) + 2 / size
        share = 2 * margin
        lower, upper = int((q - margin) * size), int((q + margin) * size) + 1
        ordered = sample.numpy()
        ordered.partition([min(max(rank, 0), size - 1) for rank in (lower, upper)])
        ends = [float(ordered[lower]) if lower > 0 else 0.0, float(ordered[upper]) if upper < size else math.inf]
    return torch.tensor(ends, dtype=torch.float64), share * entries
