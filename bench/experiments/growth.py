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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from snell.bench import memory
from snell.bench.clock import Step, fewest, median_ratio, take_turns, turns_within
from snell.bench.contenders import one_layer
from snell.bench.experiments import cost_model
from snell.bench.experiments.cost_model import DTYPES, Calibration, Point, predicted_seconds, takes_products
from snell.bench.experiments.layer import Layers
from snell.bench.names import METHODS
from snell.bench.report import Cell, Columns, Document, Panel, Series, made_by, picture, table

#: A measured time within this share of the prediction is as the design asks.
TOLERANCE = 0.2

Row = Mapping[str, Any]
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


#: What an axis plots: its label, and a row's place on it. Sparsity stands as the share that survives.
AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "m*n": ("m·n, entries of the weight", lambda row: row["in_features"] * row["out_features"]),
    "rank": ("rank r", lambda row: row["rank"]),
    "tokens": ("tokens T", lambda row: row["tokens"]),
    # Rounded, as 1 - 0.9 is not quite 0.1.
    "survivors": ("share that survives, 1 - s", lambda row: round(1 - row["sparsity"], 6)),
    "depth": ("depth, layers", lambda row: row["depth"]),
}


def slope(xs: Sequence[float], ys: Sequence[float | None]) -> float | None:
    """The least-squares slope of log y over log x; None where a y is None or 0."""
    if not all(ys):
        return None
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def clock_of(measured: Mapping[str, Sequence[Row]]) -> float:
    """Seconds of the calibration's GEMM, the median over all points."""
    return statistics.median(row["clock_seconds"] for rows in measured.values() for row in rows)


def figures(row: Row, clock: float) -> dict[str, float | None]:
    """Seconds of SNELL, its model, LoRA and the floor, as if a GEMM of the calibration size had taken ``clock`` seconds
    at this point too; and bytes kept and at the peak, None where the system does not tell."""
    seconds = row["seconds"] | {"model": row["seconds"]["snell"] / row["measured_over_predicted"]}
    found = {name: clock / row["clock_seconds"] * taken for name, taken in seconds.items()}
    for name, sizes in row["memory"].items():
        found |= {f"{name} saved": sizes["saved_bytes"], f"{name} extra": sizes["extra_peak_bytes"]}
    predicted = row["predicted_bytes"]
    return found | {"model saved": predicted["saved"], "model extra": predicted["outputs"] + predicted["workspace"]}


def slopes(measured: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """For each axis the slope of every figure."""
    clock, found = clock_of(measured), []
    for axis, (label, place) in AXES.items():
        rows = [figures(row, clock) for row in measured[axis]]
        places = [place(row) for row in measured[axis]]
        found.append({"axis": label} | {name: slope(places, [row[name] for row in rows]) for name in rows[0]})
    return found


def _both(*names: str) -> Cell:
    # + 0.0 takes the sign from a zero.
    return lambda row: ", ".join("-" if row[name] is None else f"{round(row[name], 2) + 0.0:.2f}" for name in names)


SLOPE_COLUMNS: Columns = [
    ("axis", "{axis}"),
    ("time: SNELL, model", _both("snell", "model")),
    ("LoRA", _both("lora")),
    ("floor", _both("floor")),
    ("kept: SNELL, model", _both("snell saved", "model saved")),
    ("LoRA", _both("lora saved")),
    ("extra peak: SNELL, model", _both("snell extra", "model extra")),
    ("LoRA", _both("lora extra")),
]

PREDICTION_COLUMNS: Columns = [
    ("axis", "{axis}"),
    ("in x out", "{in_features} x {out_features}"),
    ("r", "{rank}"),
    ("T", "{tokens}"),
    ("s", "{sparsity:g}"),
    ("layers", "{depth}"),
    ("GEMMs", lambda row: "2" if row["survivors_products_alone"] else "3"),
    ("measured", "{seconds[snell]:ms}"),
    ("predicted", "{predicted:ms}"),
    ("measured / predicted", "{ratio}"),
    ("with one GEMM rate", "{measured_over_predicted_single_rate:.2f}"),
    ("of the floor", "{snell_over_floor:.2f}"),
    ("of LoRA", "{snell_over_lora:.2f}"),
    ("extra peak / predicted", "{extra:.2f}"),
]


def within_tolerance(ratio: float) -> bool:
    """Whether measured over predicted is as close to 1 as the design asks."""
    return abs(ratio - 1) <= TOLERANCE


def prediction_table(measured: Mapping[str, Sequence[Row]]) -> str:
    """Measured beside predicted; a time out of the tolerance is marked in bold."""
    shown = []
    for axis, row in ((axis, row) for axis, rows in measured.items() for row in rows):
        ratio, sizes = row["measured_over_predicted"], figures(row, 1.0)
        extra = sizes["snell extra"] and sizes["snell extra"] / sizes["model extra"]
        marked = f"{ratio:.2f}" if within_tolerance(ratio) else f"**{ratio:.2f}, off**"
        added = {"axis": axis, "extra": extra, "ratio": marked, "predicted": row["seconds"]["snell"] / ratio}
        shown.append({**row, **added})
    return table(PREDICTION_COLUMNS, shown)


def summary(measured: Mapping[str, Sequence[Row]]) -> str:
    """How many points lie within the tolerance, in one sentence."""
    point = [field.name for field in fields(Point)]
    rows = list({tuple(row[key] for key in point): row for rows in measured.values() for row in rows}.values())
    at_point, single = ([row[f"measured_over_predicted{key}"] for row in rows] for key in ("", "_single_rate"))
    count, count_single = (sum(map(within_tolerance, ratios)) for ratios in (at_point, single))
    worst, of = max(at_point, key=lambda ratio: abs(math.log(ratio))), f"of {len(rows)} points"
    within = f"{count} {of}; {count_single} {of} with one GEMM rate"
    return f"Within {TOLERANCE:.0%} of the prediction: {within}. Furthest off: {worst:.2f}."


def report(document: Document) -> str:
    """The results file as Markdown."""
    measured = document["axes"]
    tables = table(SLOPE_COLUMNS, slopes(measured)), prediction_table(measured)
    return "\n\n".join([*tables, summary(measured), made_by(document)])


def draw(path: Path, document: Document) -> None:
    """Time along every axis with the model's line, and memory along m*n; all log-log."""
    measured, clock = document["axes"], clock_of(document["axes"])
    snell, lora, floor = (METHODS[name].colour for name in ("snell", "lora", "full"))
    panels = []
    for axis, (label, place) in AXES.items():
        rows = sorted(measured[axis], key=place)
        xs, found = [place(row) for row in rows], [figures(row, clock) for row in rows]
        of = {name: [1e3 * row[name] for row in found] for name in ("model", "snell", "lora", "floor")}
        band = [[t * (1 + sign * TOLERANCE) for t in of["model"]] for sign in (-1, 1)]
        series = [
            Series(of["model"], xs, f"cost model, ± {TOLERANCE:.0%}", snell, band=band),
            Series(of["snell"], xs, "SNELL, measured", snell, "o"),
            Series(of["lora"], xs, "PEFT LoRA", lora, "s--", style={"linewidth": 1, "markersize": 4}),
            Series(of["floor"], xs, "floor: three GEMMs", floor, ":"),
        ]
        # At least most of a decade, so that a flat line looks flat.
        low, high = (limit(map(limit, of.values())) for limit in (min, max))
        style = {
            "ticks": None if axis == "m*n" else {x: f"{x:g}" for x in xs},
            "ylim": (min(low, high / 8), high * 1.2),
        }
        panels.append(Panel("time of a step", series, label, "forward + backward, ms", "xy", **style))
    panels[0].legend = {"fontsize": 8}
    (label, place), rows, series = AXES["m*n"], measured["m*n"], []
    xs, found = [place(row) for row in rows], [figures(row, clock) for row in rows]
    for kind, meaning, style in (("extra", "extra peak", {}), ("saved", "kept", {"fillstyle": "none", "alpha": 0.5})):
        for who, look, colour in (("SNELL", "o", snell), ("model", "-", snell), ("LoRA", "s", lora)):
            mib = [(row[f"{who.lower()} {kind}"] or math.nan) / 2**20 for row in found]
            series.append(Series(mib, xs, f"{who}, {meaning}", colour, look, style=style))
    series.append(Series([4 * x / 2**20 for x in xs], xs, "a float32 matrix of m·n", floor, ":"))
    # Room for the legend.
    style = {"ylim": (0.1, None), "legend": {"fontsize": 8, "ncols": 2, "loc": "lower right"}}
    panels.append(Panel("memory of a step", series, label, "MiB", "xy", **style))
    title = "How a layer's training step grows, measured and predicted"
    picture(path, title, [panels[:3], panels[3:]], 4.8, 4)
