"""Rates of the cost model: seconds per unit of work, from single operations at one size, SIDE x SIDE.

Nothing here runs a layer but ``call``, a layer so small that all its time is overhead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from snell import SnellLinear, functional, memo, native
from snell.bench.cost_model import at_rank
from snell.bench.measure import Step
from snell.schedule import backend_of

#: Rows and columns, and tokens of a GEMM. What a CPU's caches hold; enough to fill a GPU.
SIDE = {"cpu": 1024, "cuda": 4096}
TOKENS = {"cpu": 512, "cuda": 8192}

#: Where rates are measured; other ranks lie on the line through these two.
RANKS = (32, 128)

#: Sparsities at which the passes over survivors are measured, beside one at which nothing survives.
FEW, MANY = 0.9, 0.5

#: Tokens of the survivors' products: what a kernel takes at once at most, and a single round of its inner loop.
LONG, SHORT = 512, 64

KERNEL, GROUPS, GATE = "piecewise_linear", 2, "soft"


class Operations:
    """The layer's single operations on one update of SIDE x SIDE, ready to be timed by name."""

    def __init__(self, rank: int, dtype: torch.dtype, device: str) -> None:
        self.side, self.device = SIDE[device], device
        options = {"device": device, "dtype": dtype}
        layer = SnellLinear(self.side, self.side, bias=False, rank=rank, kernel=KERNEL, groups=GROUPS, **options)
        self.backend = backend_of(torch.device(device))
        A, B, self.theta = (t.detach() for t in (layer.snell_A, layer.snell_B, layer.snell_theta))
        self.grads = tuple(torch.zeros_like(t) for t in (A, B, self.theta))
        self.selected = A, B
        # Where a backend copies the factors, it does so once a pass and not once a block.
        self.A, self.B = self.backend.laid_out(A, B) if hasattr(self.backend, "laid_out") else (A, B)
        self.tau = {s: self._select(s) for s in (FEW, MANY)} | {1.0: A.new_full((), float("inf"))}
        self.weight, self.G, self.out = layer.weight.detach(), *(torch.randn_like(layer.weight) for _ in range(2))
        # [features, tokens]: the kernel reads activations transposed.
        self.activations = {t: [torch.randn(self.side, t, **options) for _ in range(2)] for t in (SHORT, LONG)}

    def _select(self, sparsity: float) -> Tensor:
        memo.clear()
        return functional.select_threshold(*self.selected, self.theta, sparsity=sparsity, kernel=KERNEL, groups=GROUPS)

    def _fused(self, sparsity: float) -> None:
        update = self.A, self.B, self.theta, self.tau[sparsity]
        self.backend.factor_grad(self.G, *update, self.weight, self.out, *self.grads, KERNEL, GROUPS, GATE)

    def _merge(self) -> None:
        update = self.A, self.B, self.theta, self.tau[FEW]
        self.backend.merge_out(*update, self.weight, self.out, KERNEL, GROUPS, GATE)

    def _products(self, sparsity: float, tokens: int) -> None:
        update = self.A, self.B, self.theta, self.tau[sparsity]
        native.factor_grad_of_tokens(*self.activations[tokens], *update, *self.grads, KERNEL, GROUPS, GATE)

    def steps(self) -> dict[str, Step]:
        """What to time, by name; :meth:`rates` turns the times into rates."""
        steps: dict[str, Step] = {
            "select": lambda: self._select(FEW),
            "merge": self._merge,
            "fused, none": lambda: self._fused(1.0),
            "fused, many": lambda: self._fused(MANY),
        }
        if hasattr(self.backend, "factor_grad_of_tokens"):
            steps |= {
                "products, none": lambda: self._products(1.0, SHORT),
                "products, short": lambda: self._products(FEW, SHORT),
                "products, long": lambda: self._products(FEW, LONG),
                "transpose": lambda: self.activations[LONG][0].t().contiguous(),
            }
        return steps

    def rates(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Seconds per unit of each kind of work in cost_model.work_of, but ``gemm`` and ``call``."""
        entries = self.side**2
        fused = seconds["fused, none"] / entries
        rates = {
            "select": seconds["select"] / entries,
            "merge": seconds["merge"] / entries,
            "fused": fused,
            "fused move": (seconds["fused, many"] / entries - fused) / (1 - MANY),
        }
        if "transpose" in seconds:
            survivors = (1 - FEW) * entries
            product = (seconds["products, long"] - seconds["products, short"]) / (survivors * (LONG - SHORT))
            found = seconds["products, short"] - seconds["products, none"]
            rates |= {
                "list": seconds["products, none"] / entries,
                "product": product,
                "move": found / survivors - SHORT * product,
                "transpose": seconds["transpose"] / (self.side * LONG),
            }
        return rates


class Common:
    """What does not depend on the rank: a call's overhead, and a GEMM at the calibration size."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        options = {"device": device, "dtype": dtype}
        side, self.tokens = SIDE[device], TOKENS[device]
        self.flops = 6 * self.tokens * side**2
        self.layer = SnellLinear(16, 16, **options)
        self.few = torch.randn(4, 16, **options).requires_grad_()
        self.inputs = self.few, self.layer.snell_A, self.layer.snell_B
        self.x, self.weight, self.grad_y = (torch.randn(k, side, **options) for k in (self.tokens, side, self.tokens))

    def _call(self) -> None:
        memo.clear()
        torch.autograd.grad(self.layer(self.few), self.inputs, torch.ones_like(self.few))

    def _gemm(self) -> None:
        _ = self.x @ self.weight.T, self.grad_y @ self.weight, self.grad_y.T @ self.x

    def steps(self) -> dict[str, Step]:
        """What to time, by name."""
        return {"call": self._call, "gemm": self._gemm}

    def rates(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Seconds of a call, and of a floating-point operation of a GEMM of the calibration size."""
        return {"call": seconds["call"], "gemm": seconds["gemm"] / self.flops}


class Calibration:
    """Every rate of the cost model, for layers of ``dtype`` on ``device``."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.common = Common(dtype, device)
        self.operations = {rank: Operations(rank, dtype, device) for rank in RANKS}

    def _needed(self, rank: int) -> dict[int, Operations]:
        """A rank that is measured needs no line through two."""
        return {rank: self.operations[rank]} if rank in self.operations else self.operations

    def steps(self, rank: int) -> dict[str, Step]:
        """What to time for rates at ``rank``, by name."""
        steps = self.common.steps()
        for measured, operations in self._needed(rank).items():
            steps |= {f"{name}, rank {measured}": step for name, step in operations.steps().items()}
        return steps

    def rates(self, seconds: Mapping[str, float], rank: int) -> dict[str, float]:
        """Seconds per unit of each kind of work in cost_model.work_of, from the times of :meth:`steps`."""
        found = [
            operations.rates({name: seconds[f"{name}, rank {measured}"] for name in operations.steps()})
            for measured, operations in self._needed(rank).items()
        ]
        rates = found[0] if len(found) == 1 else at_rank(found[0], found[1], RANKS, rank)
        return rates | self.common.rates(seconds)
