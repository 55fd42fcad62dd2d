"""What growth shows: slopes on a log-log plot, predictions beside measurements, and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snell.bench.cost_model import TOLERANCE, within_tolerance
from snell.bench.record import made_by

Row = Mapping[str, Any]

#: What an axis plots: its label, and a row's place on it. Sparsity stands as the share that survives.
AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "m*n": ("m·n, entries of the weight", lambda row: row["in_features"] * row["out_features"]),
    "rank": ("rank r", lambda row: row["rank"]),
    "tokens": ("tokens T", lambda row: row["tokens"]),
    "survivors": ("share that survives, 1 - s", lambda row: 1 - row["sparsity"]),
    "depth": ("depth, layers", lambda row: row["depth"]),
}

#: What is fitted, by name: seconds at a common clock, then bytes.
TIMES = ("snell", "model", "lora", "floor")
BYTES = ("snell saved", "model saved", "lora saved", "snell extra", "model extra", "lora extra")

COLOURS = {"snell": "#1f77b4", "model": "#1f77b4", "lora": "#e08e45", "floor": "#5f6b7a"}


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The least-squares slope of log y over log x.

    Raises:
        ValueError: a number that is not positive, or fewer than two different xs.
    """
    if min(*xs, *ys) <= 0 or len(set(xs)) < 2:
        raise ValueError(f"a slope on a log-log plot needs positive numbers at two xs or more; got {xs}, {ys}")
    logs_x, logs_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.linear_regression(logs_x, logs_y).slope


def times_of(row: Row, clock: float) -> dict[str, float]:
    """Seconds by name of TIMES, as if a GEMM of the calibration size had taken ``clock`` seconds at this point too."""
    scale = clock / row["clock_seconds"]
    model = row["seconds"]["snell"] / row["measured_over_predicted"]
    return {name: scale * seconds for name, seconds in (row["seconds"] | {"model": model}).items()}


def bytes_of(row: Row) -> dict[str, float | None]:
    """Bytes by name of BYTES; None where the system does not tell."""
    predicted, memory = row["predicted_bytes"], row["memory"]
    return {
        "snell saved": memory["snell"]["saved_bytes"],
        "model saved": predicted["saved"],
        "lora saved": memory["lora"]["saved_bytes"],
        "snell extra": memory["snell"]["extra_peak_bytes"],
        "model extra": predicted["outputs"] + predicted["workspace"],
        "lora extra": memory["lora"]["extra_peak_bytes"],
    }


def _clock(measured: Mapping[str, Sequence[Row]]) -> float:
    return statistics.median(row["clock_seconds"] for rows in measured.values() for row in rows)


def slopes(measured: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float | None]]:
    """For each axis the slope of every time and every size of memory; None where one cannot be fitted."""
    clock, found = _clock(measured), {}
    for axis, rows in measured.items():
        places = [AXES[axis][1](row) for row in rows]
        columns = [times_of(row, clock) | bytes_of(row) for row in rows]
        found[axis] = {
            name: None if any(not column[name] for column in columns) else slope(places, [c[name] for c in columns])
            for name in (*TIMES, *BYTES)
        }
    return found


def slope_table(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """The slopes as a Markdown table, SNELL beside its model, LoRA and the floor."""
    columns = ("axis", "time: SNELL, model", "LoRA", "floor", "kept: SNELL, model", "LoRA")
    columns += ("extra peak: SNELL, model", "LoRA")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for axis, of in found.items():

        def text(*names: str, of: Mapping[str, float | None] = of) -> str:
            # + 0.0 takes the sign from a zero.
            return ", ".join("-" if of[name] is None else f"{round(of[name], 2) + 0.0:.2f}" for name in names)

        pairs = ("snell", "model"), ("lora",), ("floor",), ("snell saved", "model saved"), ("lora saved",)
        cells = [text(*names) for names in (*pairs, ("snell extra", "model extra"), ("lora extra",))]
        lines.append(f"| {AXES[axis][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prediction_table(measured: Mapping[str, Sequence[Row]]) -> str:
    """Measured beside predicted as a Markdown table; a time out of the tolerance is marked in bold."""
    columns = ("axis", "in x out", "r", "T", "s", "layers", "GEMMs", "measured", "predicted", "measured / predicted")
    columns += ("with one GEMM rate", "of the floor", "of LoRA")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for axis, rows in measured.items():
        for row in rows:
            ratio, taken = row["measured_over_predicted"], row["seconds"]["snell"]
            marked = f"{ratio:.2f}" if within_tolerance(ratio) else f"**{ratio:.2f}, off**"
            lines.append(
                f"| {axis} | {row['in_features']} x {row['out_features']} | {row['rank']} | {row['tokens']} "
                f"| {row['sparsity']:g} | {row['depth']} | {2 if row['survivors_products_alone'] else 3} "
                f"| {taken * 1e3:.3g} ms | {taken / ratio * 1e3:.3g} ms | {marked} "
                f"| {row['measured_over_predicted_single_rate']:.2f} | {row['snell_over_floor']:.2f} "
                f"| {row['snell_over_lora']:.2f} |"
            )
    return "\n".join(lines)


def summary(measured: Mapping[str, Sequence[Row]]) -> str:
    """How many points lie within the tolerance, in one sentence."""
    rows = list({tuple(row[key] for key in _POINT): row for rows in measured.values() for row in rows}.values())
    keys = {"": "measured_over_predicted", " with one GEMM rate": "measured_over_predicted_single_rate"}
    within = {name: sum(within_tolerance(row[key]) for row in rows) for name, key in keys.items()}
    counted = "; ".join(f"{count} of {len(rows)} points{name}" for name, count in within.items())
    worst = max(rows, key=lambda row: abs(math.log(row["measured_over_predicted"])))
    return f"Within {TOLERANCE:.0%} of the prediction: {counted}. Furthest off: {worst['measured_over_predicted']:.2f}."


_POINT = ("in_features", "out_features", "rank", "tokens", "sparsity", "depth")


def report(document: Mapping[str, Any]) -> str:
    """The results file as Markdown."""
    measured = document["axes"]
    tables = slope_table(document["slopes"]), prediction_table(measured), summary(measured), made_by(document)
    return "\n\n".join(tables)


def _time_panel(axes: Axes, axis: str, rows: Sequence[Row], clock: float) -> None:
    label, place = AXES[axis]
    rows = sorted(rows, key=place)
    xs, times = [place(row) for row in rows], [times_of(row, clock) for row in rows]

    def milliseconds(name: str) -> list[float]:
        return [1e3 * t[name] for t in times]

    model = milliseconds("model")
    low, high = ([t * (1 + sign * TOLERANCE) for t in model] for sign in (-1, 1))
    axes.fill_between(xs, low, high, color=COLOURS["model"], alpha=0.15, linewidth=0)
    axes.plot(xs, model, color=COLOURS["model"], label=f"cost model, ± {TOLERANCE:.0%}")
    axes.plot(xs, milliseconds("snell"), "o", color=COLOURS["snell"], label="SNELL, measured")
    axes.plot(xs, milliseconds("lora"), "s--", color=COLOURS["lora"], linewidth=1, markersize=4, label="PEFT LoRA")
    axes.plot(xs, milliseconds("floor"), ":", color=COLOURS["floor"], label="floor: three GEMMs")
    axes.set_xlabel(label)
    axes.set_ylabel("forward + backward, ms")


def _memory_panel(axes: Axes, rows: Sequence[Row]) -> None:
    label, place = AXES["m*n"]
    rows = sorted(rows, key=place)
    xs, sizes = [place(row) for row in rows], [bytes_of(row) for row in rows]
    styles = {"snell": "o", "model": "-", "lora": "s"}
    for kind, colours, meaning in (("extra", COLOURS, "extra peak"), ("saved", COLOURS, "kept for backward")):
        for name, style in styles.items():
            ys = [math.nan if size[f"{name} {kind}"] is None else size[f"{name} {kind}"] / 2**20 for size in sizes]
            full = {"fillstyle": "none" if kind == "saved" else "full", "markersize": 5, "linewidth": 1}
            who = {"snell": "SNELL", "model": "model", "lora": "LoRA"}[name]
            axes.plot(xs, ys, style, color=colours[name], label=f"{who}, {meaning}", **full)
    axes.plot(xs, [4 * x / 2**20 for x in xs], ":", color=COLOURS["floor"], label="one float32 matrix m·n")
    axes.set_xlabel(label)
    axes.set_ylabel("memory, MiB")


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Time along every axis with the model's line, and memory along m*n; all log-log."""
    measured = document["axes"]
    figure = Figure(figsize=(14, 8.2), layout="constrained")
    panels = figure.subplots(2, 3).flat
    clock = _clock(measured)
    for (axis, rows), axes in zip(measured.items(), panels, strict=False):
        _time_panel(axes, axis, rows, clock)
    _memory_panel(panels[len(measured)], measured["m*n"])
    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
