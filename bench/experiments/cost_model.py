"""The cost model: how much of each kind of work one training step of a SNELL layer is, times what a unit of it costs.

Counts come from how the layer is computed. Rates, seconds per unit of work, come from single operations at one size,
SIDE x SIDE; nothing is fitted to the times predicted. docs/cost-model.md has the formula in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from snell import SnellLinear
from snell.bench import core
from snell.bench.clock import Step
from snell.bench.experiments.layer import Layers, floor_step

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

#: Rows and columns, and tokens of a GEMM. What a CPU's caches hold; enough to fill a GPU.
SIDE = {"cpu": 1024, "cuda": 4096}
TOKENS = {"cpu": 512, "cuda": 8192}

#: Where rates are measured; other ranks lie on the line through these two.
RANKS = (32, 128)

#: Sparsities at which the passes over survivors are measured, beside one at which nothing survives.
FEW, MANY = 0.9, 0.5

#: Tokens of the survivors' products: what a kernel takes at once at most, and a single round of its inner loop.
LONG, SHORT = 512, 64


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


def takes_products(point: Point, device: str) -> bool:
    """Whether backward takes the survivors' G alone, as the CPU's backend does in float32."""
    able = core.takes_survivors(device) and DTYPES[device] == torch.float32 and point.sparsity > 0
    return able and core.worth_taking_survivors(point.tokens, point.entries, point.survivors)


def work_of(point: Point, products: bool) -> dict[str, float]:
    """How many units of each kind of work one layer's forward and backward are.

    Args:
        products: whether the survivors' G is taken alone (:func:`takes_products`).

    Returns:
        Counts by name. ``call``: 1. ``gemm``: floating-point operations of library GEMMs. ``select``, ``merge``,
        ``fused`` (gradients and merge in one pass over G), ``list`` (finding survivors): entries, once for each pass.
        ``fused move``, ``move``: survivors whose rows of the factors' gradients are moved. ``product``: survivors times
        tokens. ``transpose``: activations copied.
    """
    m, n, tokens, entries = point.out_features, point.in_features, point.tokens, point.entries
    work: dict[str, float] = {"call": 1, "select": entries} if point.sparsity > 0 else {"call": 1}
    if not products:
        # x W^T, dY^T X and dY W; the pass that turns G into gradients leaves W0 + dW for the last.
        return work | {"gemm": 6 * entries * tokens, "merge": entries, "fused": entries, "fused move": point.survivors}
    slabs = core.num_slabs(tokens, m, n, torch.float32.itemsize)
    work |= {"gemm": 4 * entries * tokens, "merge": 2 * entries, "list": slabs * entries}
    return work | {
        "move": slabs * point.survivors,
        "product": tokens * point.survivors,
        "transpose": (m + n) * tokens,
    }


def predicted_seconds(point: Point, products: bool, rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step of all ``depth`` layers, by kind of work; ``rates`` holds seconds per unit of each."""
    return {kind: point.depth * count * rates[kind] for kind, count in work_of(point, products).items()}


def predicted_bytes(point: Point, products: bool, element_size: int, device: str) -> dict[str, int]:
    """What a step should hold, in bytes, for activations of ``element_size`` and float32 factors.

    Returns:
        ``saved``: kept from forward to backward beyond parameters: every layer's x and tau. ``outputs``: of the extra
        peak, what the caller asked for: outputs of every layer, the gradient of x and of the factors. ``workspace``:
        the rest, a block of W0 + dW or a slab of transposed activations, whichever is more.
    """
    m, n, tokens = point.out_features, point.in_features, point.tokens
    blocks = [lines * core.block_length(lines * element_size, others, device) for lines, others in ((n, m), (m, n))]
    slab = (m + n) * -(-tokens // core.num_slabs(tokens, m, n, element_size)) if products else 0
    return {
        "saved": point.depth * (tokens * n * element_size + 4),
        "outputs": tokens * (point.depth * m + n) * element_size + 4 * point.depth * point.rank * (m + n),
        "workspace": max(*blocks, slab) * element_size,
    }


def operations(rank: int, device: str) -> dict[str, Step]:
    """The layer's single operations on one update of SIDE x SIDE, by name."""
    side, options = SIDE[device], {"device": device, "dtype": DTYPES[device]}
    update, denser = (core.new_update(side, side, rank, device, sparsity) for sparsity in (FEW, MANY))
    # Where a backend copies the factors, it does so once a pass and not once a block.
    backend = core.backend(update)
    few, many = backend.prepare(update), backend.prepare(denser)
    none, grads = few._replace(tau=torch.full_like(few.tau, torch.inf)), core.Gradients.zeros(few)
    weight, G, out = (torch.randn(side, side, **options) for _ in range(3))
    steps: dict[str, Step] = {
        "select": lambda: (core.forget(), core.select(update)),
        "merge": lambda: backend.merge(few, weight, out),
        "fused, none": lambda: backend.factor_grad(G, none, grads, weight, out),
        "fused, many": lambda: backend.factor_grad(G, many, grads, weight, out),
    }
    if core.takes_survivors(device):
        # [features, tokens]: the kernel reads activations transposed.
        short, long = ([torch.randn(side, tokens, **options) for _ in range(2)] for tokens in (SHORT, LONG))
        steps["products, none"] = lambda: core.survivors_grad_of_slab(*short, none, grads)
        steps["products, short"] = lambda: core.survivors_grad_of_slab(*short, few, grads)
        steps["products, long"] = lambda: core.survivors_grad_of_slab(*long, few, grads)
        steps["transpose"] = lambda: long[0].t().contiguous()
    return steps


def rates_of(seconds: Mapping[str, float], side: int) -> dict[str, float]:
    """Seconds per unit of each kind of work but ``gemm`` and ``call``, from the times of the operations."""
    entries = side**2
    rates = {"select": seconds["select"] / entries, "merge": seconds["merge"] / entries}
    rates["fused"] = seconds["fused, none"] / entries
    rates["fused move"] = (seconds["fused, many"] / entries - rates["fused"]) / (1 - MANY)
    if "transpose" in seconds:
        survivors, found = (1 - FEW) * entries, seconds["products, short"] - seconds["products, none"]
        rates["list"] = seconds["products, none"] / entries
        rates["product"] = (seconds["products, long"] - seconds["products, short"]) / (survivors * (LONG - SHORT))
        rates["move"] = found / survivors - SHORT * rates["product"]
        rates["transpose"] = seconds["transpose"] / (side * LONG)
    return rates


def at_rank(low: Mapping[str, float], high: Mapping[str, float], ranks: tuple[int, int], rank: int) -> dict[str, float]:
    """Rates at ``rank`` on the straight line through those measured at two ranks."""
    share = (rank - ranks[0]) / (ranks[1] - ranks[0])
    return {kind: low[kind] + share * (high[kind] - low[kind]) for kind in low}


class Calibration:
    """The steps to time for every rate of the cost model on ``device``, and the rates that their times give."""

    def __init__(self, device: str) -> None:
        side, tokens, options = SIDE[device], TOKENS[device], {"device": device, "dtype": DTYPES[device]}
        x, weight, grad_y = (torch.randn(k, side, **options) for k in (tokens, side, tokens))
        few = torch.randn(4, 16, **options).requires_grad_()
        # A layer so small that all its time is overhead.
        call = Layers(SnellLinear(16, 16, **options), few, torch.ones_like(few)).step
        self.common, self.side = {"call": call, "gemm": floor_step(x, weight, grad_y)}, side
        self.flops, self.operations = 6 * tokens * side**2, {rank: operations(rank, device) for rank in RANKS}

    def _needed(self, rank: int) -> tuple[int, ...]:
        """A rank that is measured needs no line through two."""
        return (rank,) if rank in RANKS else RANKS

    def steps(self, rank: int) -> dict[str, Step]:
        """What to time for rates at ``rank``, by name."""
        steps = {f"{name}, rank {r}": step for r in self._needed(rank) for name, step in self.operations[r].items()}
        return self.common | steps

    def rates(self, seconds: Mapping[str, float], rank: int) -> dict[str, float]:
        """Seconds per unit of each kind of work, from the times of :meth:`steps`."""
        times = [{name: seconds[f"{name}, rank {r}"] for name in self.operations[r]} for r in self._needed(rank)]
        found = [rates_of(one, self.side) for one in times]
        rates = found[0] if len(found) == 1 else at_rank(*found, RANKS, rank)
        return rates | {"call": seconds["call"], "gemm": seconds["gemm"] / self.flops}
