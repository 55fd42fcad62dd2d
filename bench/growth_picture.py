"""The picture of growth: times along every axis with the model's line, and memory along m*n."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from snell.bench.cost_model import TOLERANCE
from snell.bench.growth_report import AXES, Row, bytes_of, clock_of, times_of

COLOURS = {"snell": "#1f77b4", "model": "#1f77b4", "lora": "#e08e45", "floor": "#5f6b7a"}


def _time_panel(axes: Axes, axis: str, rows: Sequence[Row], clock: float) -> None:
    label, place = AXES[axis]
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
    xs, sizes = [place(row) for row in rows], [bytes_of(row) for row in rows]
    styles = {"snell": ("o", "SNELL"), "model": ("-", "model"), "lora": ("s", "LoRA")}
    for kind, meaning in (("extra", "extra peak"), ("saved", "kept for backward")):
        for name, (style, who) in styles.items():
            ys = [math.nan if size[f"{name} {kind}"] is None else size[f"{name} {kind}"] / 2**20 for size in sizes]
            look = {"fillstyle": "none", "alpha": 0.5} if kind == "saved" else {"fillstyle": "full"}
            axes.plot(xs, ys, style, color=COLOURS[name], label=f"{who}, {meaning}", markersize=5, linewidth=1, **look)
    axes.plot(xs, [4 * x / 2**20 for x in xs], ":", color=COLOURS["floor"], label="a float32 matrix of m·n")
    axes.set_xlabel(label)
    axes.set_ylabel("memory, MiB")


def _scale(axes: Axes, ticks: Sequence[float] | None) -> None:
    """Log-log, numbers written out."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    # At least most of a decade, so that a flat line looks flat.
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high / 8), high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if ticks is not None:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Time along every axis with the model's line, and memory along m*n; all log-log."""
    measured = document["axes"]
    figure = Figure(figsize=(14, 8.2), layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    clock = clock_of(measured)
    for axis, axes in zip(AXES, panels, strict=True):
        rows = sorted(measured[axis], key=AXES[axis][1])
        _time_panel(axes, axis, rows, clock)
        # Rounded, as 1 - 0.9 is not quite 0.1.
        _scale(axes, None if axis == "m*n" else [round(AXES[axis][1](row), 6) for row in rows])
    panels[0].legend(fontsize=9, frameon=False)
    _memory_panel(last, sorted(measured["m*n"], key=AXES["m*n"][1]))
    _scale(last, None)
    # Room for the legend.
    last.set_ylim(last.get_ylim()[0] / 8, None)
    last.legend(fontsize=8, frameon=False, ncols=2, loc="lower right")
    figure.savefig(path, dpi=130)
