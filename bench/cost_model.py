"""The cost model: how much of each kind of work one training step of a SNELL layer is, times what a unit of it costs.

Counts come from how the layer is computed (snell.schedule and the CPU's backend), rates from single operations measured
by :mod:`snell.bench.calibration` at another size than the one predicted. Nothing is fitted to the times predicted.
docs/cost-model.md has the formula in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from snell.backends import cpu
from snell.schedule import backend_of, block_length

#: A measured time within this share of the prediction is as the design asks.
TOLERANCE = 0.2


@dataclass(frozen=True)
class Point:
    """One setting: ``depth`` equal layers one after another, or one layer where the sides differ."""

    in_features: int
    out_features: int
    tokens: int
    rank: int
    sparsity: float
    depth: int = 1

    @property
    def entries(self) -> int:
        """m * n of one layer."""
        return self.in_features * self.out_features

    @property
    def survivors(self) -> float:
        """(1 - s) * m * n of one layer; every entry where there is no competition."""
        return (1 - self.sparsity) * self.entries


def takes_products(point: Point, dtype: torch.dtype, device: str) -> bool:
    """Whether backward takes the survivors' G alone, as snell.backends.cpu.factor_grad_of_tokens decides it.

    The layer estimates the share of survivors from a sample; here it is 1 - s.
    """
    able = hasattr(backend_of(torch.device(device)), "factor_grad_of_tokens") and dtype == torch.float32
    worth = point.tokens * point.entries >= cpu.WORTH_ASKING
    return able and worth and point.sparsity > 0 and point.survivors <= cpu.FEW_SURVIVORS * point.entries


def work_of(point: Point, products: bool) -> dict[str, float]:
    """How many units of each kind of work one layer's forward and backward are.

    Args:
        point: the setting.
        products: whether the survivors' G is taken alone (:func:`takes_products`).

    Returns:
        Counts by name. ``call``: 1. ``gemm``: floating-point operations of library GEMMs. ``select``, ``merge``,
        ``fused`` (gradients and merge in one pass over G), ``list`` (finding survivors): entries, once for each pass.
        ``fused move``, ``move``: survivors whose rows of the factors' gradients are moved. ``product``: survivors times
        tokens. ``transpose``: activations copied.
    """
    m, n, tokens, entries, survivors = (
        point.out_features,
        point.in_features,
        point.tokens,
        point.entries,
        point.survivors,
    )
    work: dict[str, float] = {"call": 1}
    if point.sparsity > 0:
        work["select"] = entries
    if not products:
        # x W^T, dY^T X and dY W; the pass that turns G into gradients leaves W0 + dW for the last.
        return work | {"gemm": 6 * entries * tokens, "merge": entries, "fused": entries, "fused move": survivors}
    slabs = cpu.num_slabs(tokens, m, n, torch.float32.itemsize)
    return work | {
        "gemm": 4 * entries * tokens,
        "merge": 2 * entries,
        "list": slabs * entries,
        "move": slabs * survivors,
        "product": tokens * survivors,
        "transpose": (m + n) * tokens,
    }


def predicted_seconds(point: Point, products: bool, rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step of all ``depth`` layers, by kind of work; ``rates`` holds seconds per unit of each."""
    work = work_of(point, products)
    return {kind: point.depth * count * rates[kind] for kind, count in work.items()}


def at_rank(low: Mapping[str, float], high: Mapping[str, float], ranks: tuple[int, int], rank: int) -> dict[str, float]:
    """Rates at ``rank`` on the straight line through those measured at two ranks."""
    share = (rank - ranks[0]) / (ranks[1] - ranks[0])
    return {kind: low[kind] + share * (high[kind] - low[kind]) for kind in low}


def predicted_bytes(point: Point, products: bool, element_size: int, device: str) -> dict[str, int]:
    """What a step should hold, in bytes, for activations of ``element_size`` and float32 factors.

    Returns:
        ``saved``: kept from forward to backward beyond parameters: every layer's x and tau. ``outputs``: of the extra
        peak, what the caller asked for: outputs of every layer, the gradient of x and of the factors. ``workspace``:
        the rest, a block of W0 + dW or a slab of transposed activations, whichever is more.
    """
    m, n, tokens = point.out_features, point.in_features, point.tokens
    blocks = [lines * block_length(lines * element_size, others, device) for lines, others in ((n, m), (m, n))]
    slab = (m + n) * -(-tokens // cpu.num_slabs(tokens, m, n, element_size)) if products else 0
    return {
        "saved": point.depth * (tokens * n * element_size + 4),
        "outputs": tokens * (point.depth * m + n) * element_size + 4 * point.depth * point.rank * (m + n),
        "workspace": max(*blocks, slab) * element_size,
    }


def within_tolerance(ratio: float) -> bool:
    """Whether measured over predicted is as close to 1 as the design asks."""
    return abs(ratio - 1) <= TOLERANCE
