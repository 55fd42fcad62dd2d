"""How a layer's time and memory grow with m*n, rank, tokens, sparsity and depth, beside the cost model's prediction.

    snell bench growth [--device cuda]

Every point times SNELL, PEFT's LoRA, the GEMMs of the floor and the cost model's single operations in turns, and a
prediction is made anew in every repetition, so that the clock of the machine hits both sides alike. docs/cost-model.md
explains the model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from snell import SnellLinear, memo
from snell.bench.calibration import RANKS, SIDE, Calibration
from snell.bench.cost_model import Point, predicted_bytes, predicted_seconds, takes_products, work_of
from snell.bench.growth_report import draw, report, slopes
from snell.bench.layer import repetitions_within
from snell.bench.measure import Step, extra_peak_bytes, interleaved, median_ratio, saved_bytes
from snell.bench.record import device_option, out_option, write

__all__ = ["axes", "main", "measure_point", "report"]

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

#: Seconds a point may take in all, where the fewest repetitions allow it.
BUDGET_SECONDS = 6.0

Axes = dict[str, list[Point]]


def axes(device: str) -> Axes:
    """The points along each axis; the axes but m*n go through one layer, a ViT's first MLP or a 7B Llama's on a GPU."""
    if device == "cpu":
        squares = ((s, s) for s in (512, 724, 1024, 1536, 2048, 3072, 4096, 5120))
        sides: tuple[tuple[int, int], ...] = (*squares, (768, 3072), (4096, 11008))
        middle, tokens, rows = Point(768, 3072, 512, 32, 0.9), (64, 256, 1024, 2048, 4096), 512
    else:
        sides = (*((s, s) for s in (1024, 2048, 4096, 8192)), (4096, 11008), (8192, 28672))
        middle, tokens, rows = Point(4096, 11008, 8192, 32, 0.9), (512, 2048, 8192, 16384), 2048
    return {
        "m*n": [replace(middle, in_features=n, out_features=m) for n, m in sides],
        "rank": [replace(middle, rank=r) for r in (8, 16, 32, 64, 128)],
        "tokens": [replace(middle, tokens=t) for t in tokens],
        "survivors": [replace(middle, sparsity=s) for s in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)],
        "depth": [replace(middle, in_features=rows, out_features=rows, depth=d) for d in (1, 2, 4, 8, 16)],
    }


class Layers:
    """Forward and backward through ``depth`` layers of one kind, parameters as new as in a training step."""

    def __init__(self, layers: nn.Module, x: Tensor, grad_y: Tensor) -> None:
        self.layers, self.x, self.grad_y = layers, x, grad_y
        self.inputs = (x, *(p for p in layers.parameters() if p.requires_grad))

    def forward(self) -> Tensor:
        return self.layers(self.x)

    def step(self) -> None:
        memo.clear()
        torch.autograd.grad(self.forward(), self.inputs, self.grad_y)

    def memory(self, device: str) -> dict[str, int | None]:
        """Bytes kept for backward beyond parameters, and the peak over what was held before a step."""
        saved = saved_bytes(self.forward, list(self.layers.parameters()))
        return {"saved_bytes": saved, "extra_peak_bytes": extra_peak_bytes(self.step, device)}


def _snell(bases: Sequence[nn.Linear], point: Point) -> nn.Module:
    settings = {"rank": point.rank, "sparsity": point.sparsity}
    return nn.Sequential(*(SnellLinear.from_linear(base, **settings) for base in bases))


def _lora(bases: Sequence[nn.Linear], point: Point) -> nn.Module:
    names = [str(index) for index in range(len(bases))]
    config = LoraConfig(r=point.rank, lora_alpha=point.rank, target_modules=names)
    return get_peft_model(nn.Sequential(*bases), config, autocast_adapter_dtype=False).base_model.model


METHODS: dict[str, Callable[[Sequence[nn.Linear], Point], nn.Module]] = {"snell": _snell, "lora": _lora}


def _gemms(bases: Sequence[nn.Linear], x: Tensor, grad_y: Tensor) -> dict[str, Step]:
    """The floor's products over all layers: the two that any step has, and the one that gives G."""
    weights, inputs = [base.weight.detach() for base in bases], x.detach()

    def two() -> None:
        for weight in weights:
            _ = inputs @ weight.T, grad_y @ weight

    def third() -> None:
        for _ in weights:
            _ = grad_y.T @ inputs

    return {"two gemms": two, "third gemm": third}


def _predictions(
    point: Point, products: bool, seconds: Mapping[str, float], calibration: Calibration
) -> tuple[dict[str, float], float]:
    """One repetition's predicted seconds by kind of work, with GEMMs as measured at the point; and in all, with GEMMs
    at the rate of the calibration's."""
    rates = calibration.rates(seconds, point.rank)
    single = sum(predicted_seconds(point, products, rates).values())
    at_point = seconds["two gemms"] + (0 if products else seconds["third gemm"])
    rates["gemm"] = at_point / (point.depth * work_of(point, products)["gemm"])
    return predicted_seconds(point, products, rates), single


def measure_point(point: Point, device: str, budget: float, calibration: Calibration) -> dict[str, Any]:
    """Times, predictions and memory at one point, within ``budget`` seconds as far as the fewest repetitions allow."""
    dtype = DTYPES[device]
    options = {"device": device, "dtype": dtype}
    bases = [nn.Linear(point.in_features, point.out_features, **options) for _ in range(point.depth)]
    x = torch.randn(point.tokens, point.in_features, **options).requires_grad_()
    grad_y = torch.randn(point.tokens, point.out_features, **options)
    layers = {name: Layers(build(bases, point), x, grad_y) for name, build in METHODS.items()}
    steps = {name: method.step for name, method in layers.items()}
    steps |= _gemms(bases, x, grad_y) | calibration.steps(point.rank)
    round_seconds = sum(taken[0] for taken in interleaved(list(steps.values()), device, 1, lambda: None))
    repetitions = repetitions_within(budget, round_seconds)
    taken = dict(zip(steps, interleaved(list(steps.values()), device, repetitions, lambda: None), strict=True))
    rounds = [{name: seconds[i] for name, seconds in taken.items()} for i in range(repetitions)]
    products = takes_products(point, dtype, device)
    by_kind, single = zip(*(_predictions(point, products, r, calibration) for r in rounds), strict=True)
    totals = [sum(kinds.values()) for kinds in by_kind]
    floors = [r["two gemms"] + r["third gemm"] for r in rounds]
    return {
        **asdict(point),
        "repetitions": repetitions,
        "survivors_products_alone": products,
        "seconds": {name: statistics.median(taken[name]) for name in layers} | {"floor": statistics.median(floors)},
        "predicted_seconds": {kind: statistics.median(k[kind] for k in by_kind) for kind in by_kind[0]},
        "clock_seconds": statistics.median(taken["gemm"]),
        "measured_over_predicted": median_ratio(taken["snell"], totals),
        "measured_over_predicted_single_rate": median_ratio(taken["snell"], single),
        "snell_over_floor": median_ratio(taken["snell"], floors),
        "snell_over_lora": median_ratio(taken["snell"], taken["lora"]),
        "memory": {name: method.memory(device) for name, method in layers.items()},
        "predicted_bytes": predicted_bytes(point, dtype.itemsize, device),
    }


def measure(chosen: Axes, device: str, budget: float) -> dict[str, list[dict[str, Any]]]:
    """Every point of every axis; a point on several axes is measured once."""
    calibration = Calibration(DTYPES[device], device)
    found: dict[Point, dict[str, Any]] = {}
    with tqdm(sorted({p for points in chosen.values() for p in points}, key=_size), unit="point") as bar:
        for point in bar:
            bar.set_postfix_str(f"{point.in_features} x {point.out_features}, depth {point.depth}")
            found[point] = measure_point(point, device, budget, calibration)
    return {axis: [found[point] for point in points] for axis, points in chosen.items()}


def _size(point: Point) -> float:
    return math.prod((point.entries, point.tokens, point.depth))


@click.command(help=__doc__)
@device_option
@click.option("--seconds", type=float, default=BUDGET_SECONDS, show_default=True, help="Time for each point.")
@out_option
def main(device: str, seconds: float, out: Path) -> None:
    torch.manual_seed(0)
    measured = measure(axes(device), device, seconds)
    settings = {
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        "calibrated at": f"{SIDE[device]} x {SIDE[device]}",
        "calibrated ranks": list(RANKS),
    }
    document = {"settings": settings, "axes": measured, "slopes": slopes(measured)}
    path = write(out, f"growth-{device}", document, benchmark="growth", device=device)
    draw(path.with_suffix(".png"), document)


if __name__ == "__main__":
    main()
