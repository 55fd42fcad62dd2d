"""How a layer's time and memory grow with m*n, rank, tokens, sparsity and depth, beside the cost model's prediction.

    snell bench growth [--device cuda]

Every point times SNELL, PEFT's LoRA, the GEMMs of the floor and the cost model's single operations in turns, and a
prediction is made anew in every repetition, so that the clock of the machine hits both sides alike. docs/cost-model.md
explains the model.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from snell.bench.calibration import RANKS, SIDE, Calibration
from snell.bench.cost_model import Point, predicted_bytes, predicted_seconds, takes_products, work_of
from snell.bench.growth_layers import DTYPES, built, gemms
from snell.bench.growth_picture import draw
from snell.bench.growth_report import report, slopes, summary
from snell.bench.layer import repetitions_within
from snell.bench.measure import interleaved, median_ratio
from snell.bench.record import device_option, out_option, write

__all__ = ["axes", "main", "report"]

#: Seconds a point may take in all, where the fewest repetitions allow it.
BUDGET_SECONDS = 6.0

Axes = dict[str, list[Point]]


def axes(device: str) -> Axes:
    """The points along each axis; the axes but m*n go through one layer, a ViT's first MLP or a 7B Llama's on a GPU."""
    if device == "cpu":
        squares: tuple[int, ...] = (512, 724, 1024, 1536, 2048, 3072, 4096, 5120)
        others = (3072, 768), (768, 3072), (4096, 11008)
        middle, tokens, rows = Point(768, 3072, 512, 32, 0.9), (64, 256, 512, 1024, 2048, 4096), 512
    else:
        squares = 1024, 2048, 4096, 8192, 10240
        others = (11008, 4096), (4096, 11008), (8192, 28672)
        middle, tokens, rows = Point(4096, 11008, 8192, 32, 0.9), (512, 2048, 8192, 16384), 2048
    return {
        "m*n": [replace(middle, in_features=side, out_features=side) for side in squares],
        "rank": [replace(middle, rank=r) for r in (8, 16, 32, 64, 128)],
        "tokens": [replace(middle, tokens=t) for t in tokens],
        "survivors": [replace(middle, sparsity=s) for s in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)],
        "depth": [replace(middle, in_features=rows, out_features=rows, depth=d) for d in (1, 2, 4, 8, 16)],
        "other shapes": [replace(middle, in_features=n, out_features=m) for n, m in others],
    }


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


def measure_times(point: Point, device: str, budget: float, calibration: Calibration) -> dict[str, Any]:
    """Times and predictions at one point, within ``budget`` seconds as far as the fewest repetitions allow."""
    bases, x, grad_y, layers = built(point, device)
    steps = {name: method.step for name, method in layers.items()}
    steps |= gemms(bases, x, grad_y) | calibration.steps(point.rank)
    round_seconds = sum(taken[0] for taken in interleaved(list(steps.values()), device, 1, lambda: None))
    repetitions = repetitions_within(budget, round_seconds)
    taken = dict(zip(steps, interleaved(list(steps.values()), device, repetitions, lambda: None), strict=True))
    rounds = [{name: seconds[i] for name, seconds in taken.items()} for i in range(repetitions)]
    products = takes_products(point, DTYPES[device], device)
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
    }


def measure_memory(point: Point, device: str) -> dict[str, Any]:
    """Kept bytes and extra peak of both methods at one point, and what the model says of SNELL's."""
    *_, layers = built(point, device)
    for method in layers.values():
        method.step()
    dtype = DTYPES[device]
    return {
        "memory": {name: method.memory(device) for name, method in layers.items()},
        "predicted_bytes": predicted_bytes(point, takes_products(point, dtype, device), dtype.itemsize, device),
    }


def return_freed_memory() -> None:
    """From now on the C library hands every block of 64 KiB and more back to the system when it is freed.

    Otherwise the resident set also counts what the C library holds back, which depends on what ran before.
    """
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)


def measure(chosen: Axes, device: str, budget: float) -> dict[str, list[dict[str, Any]]]:
    """Every point of every axis; a point on several axes is measured once."""
    calibration = Calibration(DTYPES[device], device)
    found: dict[Point, dict[str, Any]] = {}
    with tqdm(sorted({p for points in chosen.values() for p in points}, key=_size), unit="point") as bar:
        for point in bar:
            bar.set_postfix_str(f"{point.in_features} x {point.out_features}, depth {point.depth}")
            found[point] = measure_times(point, device, budget, calibration)
    # In a process of its own: this one's heap has holes by now, and returning memory at once would slow it down.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned, initializer=return_freed_memory) as apart:
        sizes = apart.map(measure_memory, found, repeat(device))
        for point, measured in zip(found, tqdm(sizes, total=len(found), unit="point", desc="memory"), strict=True):
            found[point] |= measured
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
    click.echo(summary(measured))
    document = {"settings": settings, "axes": measured, "slopes": slopes(measured)}
    path = write(out, f"growth-{device}", document, benchmark="growth", device=device)
    draw(path.with_suffix(".png"), document)


if __name__ == "__main__":
    main()
