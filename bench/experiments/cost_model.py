"""The cost model: how much of each kind of work one training step of a SNELL layer is, times what a unit of it costs.

Counts come from how the layer is computed. Rates, seconds per unit of work, come from single operations at one size,
SIDE x SIDE; nothing is fitted to the times predicted. docs/cost-model.md has the formula in one line.

Kinds of work and their units. ``call``: one. ``gemm``: floating-point operations of library GEMMs. ``select``,
``merge``, ``fused`` (gradients and merge in one pass over G), ``list`` (finding survivors): entries, once a pass.
``fused move``, ``move``: survivors whose rows of the factors' gradients are moved. ``product``: survivors times tokens.
``transpose``: activations copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from snell import SnellLinear
from snell.bench import core
from snell.bench.clock import Step
from snell.bench.experiments.layer import Layers, floor_step

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

#: Rows and columns, and tokens of a GEMM. What a CPU's caches hold; enough to fill a GPU.
SIDE, TOKENS = {"cpu": 1024, "cuda": 4096}, {"cpu": 512, "cuda": 8192}

#: Where rates are measured; other ranks lie on the line through these two.
RANKS = (32, 128)

#: Sparsities at which the passes over survivors are measured, beside one at which nothing survives.
FEW, MANY = 0.9, 0.5

#: Tokens of the survivors' products: what a kernel takes at once at most, and a single round of its inner loop.
LONG, SHORT = 512, 64

Work = Mapping[str, float]


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
        """m * n of one layer; (1 - s) of them survive, and all where there is no competition."""
        return self.in_features * self.out_features


def takes_products(point: Point, device: str) -> bool:
    """Whether backward takes the survivors' G alone, as the CPU's backend does in float32."""
    able = core.takes_survivors(device) and DTYPES[device] == torch.float32 and point.sparsity > 0
    return able and core.worth_taking_survivors(point.tokens, point.entries, (1 - point.sparsity) * point.entries)


def work_of(point: Point, products: bool) -> dict[str, float]:
    """Units of work of one layer's step; ``products`` says whether backward takes the survivors' G alone."""
    m, n, tokens, entries = point.out_features, point.in_features, point.tokens, point.entries
    survivors = (1 - point.sparsity) * entries
    work: dict[str, float] = {"call": 1, "select": entries} if point.sparsity > 0 else {"call": 1}
    if not products:
        # x W^T, dY^T X and dY W; the pass that turns G into gradients leaves W0 + dW for the last.
        return work | {"gemm": 6 * entries * tokens, "merge": entries, "fused": entries, "fused move": survivors}
    slabs = core.num_slabs(tokens, m, n, torch.float32.itemsize)
    # The last slab's pass leaves W0 + dW.
    work |= {"gemm": 4 * entries * tokens, "merge": entries, "list": slabs * entries}
    return work | {"move": slabs * survivors, "product": tokens * survivors, "transpose": (m + n) * tokens}


def predicted_seconds(point: Point, products: bool, rates: Work) -> dict[str, float]:
    """Seconds of a step of all ``depth`` layers, by kind of work."""
    return {kind: point.depth * count * rates[kind] for kind, count in work_of(point, products).items()}


def predicted_bytes(point: Point, products: bool, element_size: int, device: str) -> dict[str, int]:
    """What a step should hold for activations of ``element_size`` bytes and float32 factors.

    ``saved``: kept for backward beyond parameters, every layer's x and tau. ``outputs``: of the extra peak, outputs of
    every layer, the gradient of x and of the factors. ``workspace``: the rest, a block of W0 + dW and, in
    backward, a slab of transposed activations.
    """
    m, n, tokens = point.out_features, point.in_features, point.tokens
    rows, columns = core.block_lengths(tokens, m, n, element_size, device)
    slab = (m + n) * -(-tokens // core.num_slabs(tokens, m, n, element_size)) if products else 0
    return {
        "saved": point.depth * (tokens * n * element_size + 4),
        "outputs": tokens * (point.depth * m + n) * element_size + 4 * point.depth * point.rank * (m + n),
        "workspace": max(n * rows, m * columns + slab) * element_size,
    }


def operations(rank: int, device: str) -> dict[str, tuple[Step, Work]]:
    """The layer's single operations on one update of SIDE x SIDE, each with its work."""
    side, options = SIDE[device], {"device": device, "dtype": DTYPES[device]}
    update, denser = (core.new_update(side, side, rank, device, sparsity) for sparsity in (FEW, MANY))
    # Where a backend copies the factors, it does so once a pass and not once a block.
    backend = core.backend(update)
    few, many = backend.prepare(update), backend.prepare(denser)
    none, grads = few._replace(tau=torch.full_like(few.tau, torch.inf)), core.Gradients.zeros(few)
    weight, G, out = (torch.randn(side, side, **options) for _ in range(3))
    entries = side**2
    found: dict[str, tuple[Step, Work]] = {
        "select": (lambda: (core.forget(), core.select(update)), {"select": entries}),
        "merge": (lambda: backend.merge(few, weight, out), {"merge": entries}),
    }
    for name, of, share in (("none", none, 0), ("many", many, 1 - MANY)):
        work = {"fused": entries, "fused move": share * entries}
        found[f"fused, {name}"] = partial(backend.factor_grad, G, of, grads, weight, out), work
    if core.takes_survivors(device):
        drawn = {tokens: [torch.randn(tokens, side, **options) for _ in range(2)] for tokens in (SHORT, LONG)}
        for name, tokens, of, survivors in (
            ("none", SHORT, none, 0),
            ("short", SHORT, few, (1 - FEW) * entries),
            ("long", LONG, few, (1 - FEW) * entries),
        ):
            work = {"list": entries, "move": survivors, "product": survivors * tokens}
            step = partial(core.survivors_grad, core.activations(*drawn[tokens]), of, grads, weight, out)
            found[f"products, {name}"] = step, work
        found["transpose"] = partial(core.activations, *drawn[LONG]), {"transpose": 2 * side * LONG}
    return found


def rates_of(work: Mapping[str, Work], seconds: Work) -> dict[str, float]:
    """Seconds per unit of each kind of work, from what as many operations as there are kinds took."""
    kinds = list(dict.fromkeys(kind for units in work.values() for kind in units))
    matrix = [[units.get(kind, 0) for kind in kinds] for units in work.values()]
    return dict(zip(kinds, np.linalg.solve(matrix, [seconds[name] for name in work]).tolist(), strict=True))


def at_rank(low: Work, high: Work, ranks: tuple[int, int], rank: int) -> dict[str, float]:
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
        common = {"call": (call, {"call": 1}), "gemm": (floor_step(x, weight, grad_y), {"gemm": 6 * tokens * side**2})}
        self.operations = {0: common} | {rank: operations(rank, device) for rank in RANKS}

    def _needed(self, rank: int) -> tuple[int, ...]:
        """What depends on no rank, and a rank that is measured; where it is not, a line through two needs both."""
        return (0, rank) if rank in RANKS else (0, *RANKS)

    def steps(self, rank: int) -> dict[tuple[str, int], Step]:
        """What to time for rates at ``rank``."""
        return {(name, r): step for r in self._needed(rank) for name, (step, _) in self.operations[r].items()}

    def rates(self, seconds: Mapping[Any, float], rank: int) -> dict[str, float]:
        """Seconds per unit of each kind of work, from the times of :meth:`steps`."""
        found = []
        for r in self._needed(rank):
            work = {name: units for name, (_, units) in self.operations[r].items()}
            found.append(rates_of(work, {name: seconds[name, r] for name in work}))
        common, *at = found
        rates = common | (at[0] if len(at) == 1 else at_rank(*at, RANKS, rank))
        # A rate too small to be told from the noise may come out negative.
        return {kind: max(rate, 0.0) for kind, rate in rates.items()}
