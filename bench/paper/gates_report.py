"""The gates' results as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snell.bench.record import made_by
from snell.spec import DEFAULT_SCALES

__all__ = ["WORKING", "draw", "report", "standard_error", "sweep", "working_rates"]

#: A rate works where validation accuracy is at most this many points below that of LoRA's best rate.
WORKING = 5.0
COLOURS = {"soft": "#1f77b4", "magnitude": "#2a9d5c", "hard": "#8e44ad", "LoRA": "#e08e45"}

Row = dict[str, Any]


def standard_error(values: Sequence[float]) -> float:
    """Sample standard deviation of the values' mean."""
    return stdev(values) / math.sqrt(len(values))


def _with_error(values: Sequence[float], sign: str = "") -> str:
    return f"{fmean(values):{sign}.1f} ± {standard_error(values):.1f}"


def lora_row(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["scale"] is None)


def reference_rows(rows: Sequence[Row]) -> list[Row]:
    """LoRA, then every gate at every scale at the sparsity where scales were compared: the first of all gates' rows."""
    sparsity = next(row["sparsity"] for row in rows if row["scale"] is not None)
    return [row for row in rows if row["scale"] is None or row["sparsity"] == sparsity]


def sweep(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """For each gate and the scale it was swept at: its rows by sparsity, that without competition among them."""
    swept: dict[tuple[str, float], list[Row]] = {}
    reference = reference_rows(rows)
    for row in rows:
        if row not in reference and row["gate"] != "none":
            swept.setdefault((row["gate"], row["scale"]), [])
    for (gate, scale), found in swept.items():
        found += [row for row in rows if row["gate"] == "none" or (row["gate"], row["scale"]) == (gate, scale)]
        found.sort(key=lambda row: row["sparsity"])
    return swept


def working_rates(row: Row, rows: Sequence[Row]) -> list[float]:
    """The rates at which the row's validation accuracy is not far below that of LoRA at its best."""
    bar = max(map(fmean, lora_row(rows)["validation"])) - WORKING
    return [rate for rate, tried in zip(row["rates"], row["validation"], strict=True) if fmean(tried) >= bar]


def _rates_table(rows: Sequence[Row], rates: Sequence[float]) -> str:
    """Validation accuracy by rate, and the test's verdict."""
    lora = lora_row(rows)
    lines = [
        f"| gate | scale | {' | '.join(f'{rate:g}' for rate in rates)} | rates that work | test | test - LoRA's |",
        "|---" * (5 + len(rates)) + "|",
    ]
    for row in reference_rows(rows):
        means = [
            f"**{fmean(v):.1f}**" if r == row["rate"] else f"{fmean(v):.1f}"
            for r, v in zip(rates, row["validation"], strict=True)
        ]
        works = ", ".join(f"{rate:g}" for rate in working_rates(row, rows)) or "none"
        differences = [ours - theirs for ours, theirs in zip(row["test"], lora["test"], strict=True)]
        lines.append(
            f"| {row['gate']} | {'' if row is lora else format(row['scale'], 'g')} | {' | '.join(means)} | {works} "
            f"| {_with_error(row['test'])} | {'' if row is lora else _with_error(differences, '+')} |"
        )
    return "\n".join(lines)


def _sparsity_table(swept: dict[tuple[str, float], list[Row]]) -> str:
    """Test accuracy and chosen rate, a line each sparsity."""
    lines = [
        f"| sparsity | {' | '.join(f'{gate}, scale {scale:g}' for gate, scale in swept)} |",
        "|---" * (1 + len(swept)) + "|",
    ]
    for same in zip(*swept.values(), strict=True):
        cells = [f"{_with_error(row['test'])} ({row['rate']:g})" for row in same]
        lines.append(f"| {same[0]['sparsity']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    rows, plan = document["rows"], document["plan"]
    sparsity = reference_rows(rows)[-1]["sparsity"]
    parts = [
        f"Sparsity {sparsity:g}: accuracy on validation data by learning rate, % (mean of {len(plan['selection'])} "
        f"draws of labels; **bold** the rate it chooses; a rate works within {WORKING:g} points of LoRA's best), and "
        f"on test data at that rate (mean of {len(plan['judging'])} other draws ± its standard error):",
        _rates_table(rows, plan["rates"]),
    ]
    if swept := sweep(rows):
        parts += [
            "Test accuracy by sparsity, %, each gate at the scale and each cell at the (rate) that validation chose; "
            f"at sparsity 0 nothing competes, and the scale is {DEFAULT_SCALES['none']:g}:",
            _sparsity_table(swept),
        ]
    return "\n\n".join([*parts, made_by(document)])


def _draw_sweep(axes: Axes, rows: Sequence[Row]) -> None:
    swept = sweep(rows)
    for offset, ((gate, scale), same) in enumerate(swept.items()):
        axes.errorbar(
            [x + 0.07 * (offset - 1) for x in range(len(same))],
            [fmean(row["test"]) for row in same],
            [standard_error(row["test"]) for row in same],
            color=COLOURS[gate],
            marker="o",
            capsize=3,
            label=f"{gate}, scale {scale:g}",
        )
    lora = lora_row(rows)["test"]
    axes.axhline(fmean(lora), color=COLOURS["LoRA"], linestyle="--", label="LoRA (PEFT)")
    low, high = fmean(lora) - standard_error(lora), fmean(lora) + standard_error(lora)
    axes.axhspan(low, high, color=COLOURS["LoRA"], alpha=0.15, linewidth=0)
    sparsities = [row["sparsity"] for row in next(iter(swept.values()))]
    axes.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities])
    axes.set_xlabel("sparsity (share of dW's entries that are zero)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("by sparsity, each at its best rate (bars: standard error)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_rates(axes: Axes, rows: Sequence[Row], rates: Sequence[float]) -> None:
    shown = reference_rows(rows)
    means = [[fmean(tried) for tried in row["validation"]] for row in shown]
    best = max(map(max, means))
    axes.imshow(means, cmap="viridis", aspect="auto", vmax=best)
    for y, (row, line) in enumerate(zip(shown, means, strict=True)):
        for x, (rate, mean) in enumerate(zip(rates, line, strict=True)):
            chosen = rate == row["rate"]
            colour = "white" if mean < 0.7 * best else "black"
            axes.text(
                x, y, f"{mean:.0f}", ha="center", va="center", color=colour, fontsize=11 if chosen else 9,
                fontweight="bold" if chosen else "normal",
            )  # fmt: skip
    names = [row["gate"] if row["scale"] is None else f"{row['gate']}, {row['scale']:g}" for row in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("gate, scale")
    axes.set_title(
        f"sparsity {shown[-1]['sparsity']:g}: validation accuracy, % (bold: chosen)", loc="left", fontsize=11
    )


def draw(path: Path, document: dict[str, Any]) -> None:
    """Accuracy against sparsity, where that was swept, and against the learning rate."""
    rows = document["rows"]
    panels = 2 if sweep(rows) else 1
    figure = Figure(figsize=(6.5 * panels, 5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if panels == 2:
        _draw_sweep(axes[0], rows)
    _draw_rates(axes[-1], rows, document["plan"]["rates"])
    figure.savefig(path, dpi=130)
