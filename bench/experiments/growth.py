"""How a layer's time and memory grow with m*n, rank, tokens, sparsity and depth, beside the cost model's prediction.

    snell bench growth [--device cuda]

Every point times SNELL, PEFT's LoRA, the GEMMs of the floor and the cost model's single operations in turns, and a
prediction is made anew in every repetition, so that the clock of the machine hits both sides alike. docs/cost-model.md
explains the model.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import repeat
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from snell.bench import memory
from snell.bench.clock import Step, fewest, median_ratio, take_turns, turns_within
from snell.bench.contenders import one_layer
from snell.bench.experiments import cost_model
from snell.bench.experiments.cost_model import DTYPES, Calibration, Point, predicted_seconds, takes_products
from snell.bench.experiments.growth_report import draw, report
from snell.bench.experiments.layer import Layers

__all__ = ["draw", "measure", "report"]

Axes = Mapping[str, Sequence[Point]]


def axes(device: str) -> dict[str, list[Point]]:
    """The points along each axis; the axes but m*n go through one layer, a ViT's first MLP or a 7B Llama's on a GPU."""
    if device == "cpu":
        middle, side, tokens = Point(768, 3072, 512, 32, 0.9), 512, (64, 256, 512, 1024, 2048, 4096)
        squares, large = (512, 724, 1024, 1536, 2048, 3072, 4096, 5120), (4096, 11008)
    else:
        middle, side, tokens = Point(4096, 11008, 8192, 32, 0.9), 2048, (512, 2048, 8192, 16384)
        squares, large = (1024, 2048, 4096, 8192, 10240), (8192, 28672)
    n, m = middle.in_features, middle.out_features
    return {
        "m*n": [replace(middle, in_features=s, out_features=s) for s in squares],
        "rank": [replace(middle, rank=r) for r in (8, 16, 32, 64, 128)],
        "tokens": [replace(middle, tokens=t) for t in tokens],
        "survivors": [replace(middle, sparsity=s) for s in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)],
        "depth": [replace(middle, in_features=side, out_features=side, depth=d) for d in (1, 2, 4, 8, 16)],
        "other shapes": [replace(middle, in_features=i, out_features=o) for i, o in ((m, n), (n, m), large)],
    }


def built(point: Point, device: str) -> tuple[dict[str, Layers], dict[str, Step]]:
    """Both methods on ``depth`` layers, and the floor's GEMMs: the two that any step has, and the one that gives G."""
    options = {"device": device, "dtype": DTYPES[device]}
    x = torch.randn(point.tokens, point.in_features, **options).requires_grad_()
    grad_y = torch.randn(point.tokens, point.out_features, **options)
    bases = [nn.Linear(point.in_features, point.out_features, **options) for _ in range(point.depth)]
    layers = {}
    for method, settings in {"snell": {"sparsity": point.sparsity}, "lora": {}}.items():
        tuned = [one_layer(method, base, point.rank, **settings) for base in bases]
        layers[method] = Layers(nn.Sequential(*tuned), x, grad_y)
    weights, inputs = [base.weight.detach() for base in bases], x.detach()
    two, third = ((lambda W: (inputs @ W.T, grad_y @ W)), (lambda W: grad_y.T @ inputs))
    return layers, {"two gemms": lambda: [*map(two, weights)], "third gemm": lambda: [*map(third, weights)]}


def measure_times(point: Point, device: str, budget: float, calibration: Calibration) -> dict[str, Any]:
    """Times and predictions at one point, within ``budget`` seconds as far as the fewest repetitions allow."""
    layers, gemms = built(point, device)
    steps = {name: method.step for name, method in layers.items()} | gemms | calibration.steps(point.rank)
    take_turns(steps, device, 1)
    round_seconds = sum(taken[0] for taken in take_turns(steps, device, 1).values())
    repetitions = turns_within(budget, round_seconds, fewest(budget))
    taken = take_turns(steps, device, repetitions)
    products = takes_products(point, device)
    flops = point.depth * cost_model.work_of(point, products)["gemm"]
    by_kind, single = [], []
    for seconds in ({name: taken[name][i] for name in taken} for i in range(repetitions)):
        rates = calibration.rates(seconds, point.rank)
        single.append(sum(predicted_seconds(point, products, rates).values()))
        # GEMMs as measured at the point, in place of the calibration's.
        rates["gemm"] = (seconds["two gemms"] + (0 if products else seconds["third gemm"])) / flops
        by_kind.append(predicted_seconds(point, products, rates))
    taken["floor"] = [two + third for two, third in zip(taken["two gemms"], taken["third gemm"], strict=True)]
    return {
        **asdict(point),
        "repetitions": repetitions,
        "survivors_products_alone": products,
        "seconds": {name: statistics.median(taken[name]) for name in ("snell", "lora", "floor")},
        "predicted_seconds": {kind: statistics.median(k[kind] for k in by_kind) for kind in by_kind[0]},
        "clock_seconds": statistics.median(taken["gemm", 0]),
        "measured_over_predicted": median_ratio(taken["snell"], [sum(kinds.values()) for kinds in by_kind]),
        "measured_over_predicted_single_rate": median_ratio(taken["snell"], single),
        "snell_over_floor": median_ratio(taken["snell"], taken["floor"]),
        "snell_over_lora": median_ratio(taken["snell"], taken["lora"]),
    }


def measure_memory(point: Point, device: str) -> dict[str, Any]:
    """Kept bytes and extra peak of both methods at one point, and what the model says of SNELL's."""
    found = {}
    for name, method in built(point, device)[0].items():
        method.step()
        saved = memory.saved_bytes(method.forward, memory.held_tensors(method.module))
        found[name] = {"saved_bytes": saved, "extra_peak_bytes": memory.extra_peak_bytes(method.step, device)}
    size, products = DTYPES[device].itemsize, takes_products(point, device)
    return {"memory": found, "predicted_bytes": cost_model.predicted_bytes(point, products, size, device)}


def measure(device: str, seconds: float, chosen: Axes | None = None) -> dict[str, Any]:
    """Every point of every axis; a point on several axes is measured once."""
    torch.manual_seed(0)
    chosen = chosen or axes(device)
    points = {point for points in chosen.values() for point in points}
    ordered = sorted(points, key=lambda point: math.prod((point.entries, point.tokens, point.depth)))
    calibration = Calibration(device)
    found = {point: measure_times(point, device, seconds, calibration) for point in tqdm(ordered, unit="point")}
    # In a process of its own: this one's heap has holes by now, and returning memory at once would slow it down.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned, initializer=memory.give_back_freed_memory) as apart:
        sizes = tqdm(apart.map(measure_memory, ordered, repeat(device)), total=len(ordered), desc="memory")
        for point, measured in zip(ordered, sizes, strict=True):
            found[point] |= measured
    settings = {"dtype": str(DTYPES[device]).removeprefix("torch.")}
    settings["calibrated at"] = f"{cost_model.SIDE[device]} x {cost_model.SIDE[device]}"
    settings["calibrated ranks"] = list(cost_model.RANKS)
    rows = {axis: [found[point] for point in points] for axis, points in chosen.items()}
    return {"file": f"growth-{device}", "settings": settings, "axes": rows}
