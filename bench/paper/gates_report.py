"""What the gates' experiment shows of its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from snell.bench.names import METHODS
from snell.bench.report import (
    Cell,
    Columns,
    Document,
    Panel,
    Series,
    fill,
    made_by,
    picture,
    standard_error,
    table,
    with_error,
)
from snell.spec import DEFAULT_SCALES

#: A rate works where validation accuracy is at most this many points below that of LoRA's best rate.
WORKING = 5.0
COLOURS = {"soft": METHODS["snell"].colour, "magnitude": "#2a9d5c", "hard": "#8e44ad", "LoRA": METHODS["lora"].colour}

Row = dict[str, Any]


def reference_rows(rows: Sequence[Row]) -> list[Row]:
    """LoRA, then every gate at every scale at the sparsity where scales were compared: the first of all gates' rows."""
    return [row for row in rows if row["scale"] is None or row["sparsity"] == rows[1]["sparsity"]]


def sweep(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """For each gate and the scale it was swept at: its rows by sparsity, that without competition among them."""
    reference = reference_rows(rows)
    swept = dict.fromkeys((r["gate"], r["scale"]) for r in rows if r not in reference and r["gate"] != "none")
    same = {key: [r for r in rows if r["gate"] == "none" or (r["gate"], r["scale"]) == key] for key in swept}
    return {key: sorted(found, key=lambda row: row["sparsity"]) for key, found in same.items()}


def working_rates(row: Row, rows: Sequence[Row]) -> list[float]:
    """The rates at which the row's validation accuracy is not far below that of LoRA, the first row, at its best."""
    bar = max(map(fmean, rows[0]["validation"])) - WORKING
    return [rate for rate, tried in zip(row["rates"], row["validation"], strict=True) if fmean(tried) >= bar]


def _rates_table(rows: Sequence[Row], rates: Sequence[float]) -> str:
    """Validation accuracy by rate, and the test's verdict."""
    lora = rows[0]

    def accuracy(rate: float) -> Cell:
        def cell(row: Row) -> str:
            mean = f"{fmean(row['validation'][row['rates'].index(rate)]):.1f}"
            return f"**{mean}**" if rate == row["rate"] else mean

        return cell

    def difference(row: Row) -> str:
        pairs = zip(row["test"], lora["test"], strict=True)
        return "" if row is lora else with_error([ours - theirs for ours, theirs in pairs], "+")

    columns: Columns = [("gate", "{gate}"), ("scale", lambda row: "" if row is lora else f"{row['scale']:g}")]
    columns += [(f"{rate:g}", accuracy(rate)) for rate in rates]
    columns.append(("rates that work", lambda row: ", ".join(f"{r:g}" for r in working_rates(row, rows)) or "none"))
    return table([*columns, ("test", "{test:error}"), ("test - LoRA's", difference)], reference_rows(rows))


def report(document: Document) -> str:
    """The results file as Markdown."""
    rows, plan = document["rows"], document["plan"]
    parts = [
        f"Sparsity {rows[1]['sparsity']:g}: accuracy on validation data by learning rate, % (mean of "
        f"{len(plan['selection'])} draws of labels; **bold** the rate it chooses; a rate works within {WORKING:g} "
        f"points of LoRA's best), and on test data at that rate (mean of {len(plan['judging'])} other draws ± its "
        "standard error):",
        _rates_table(rows, plan["rates"]),
    ]
    if swept := sweep(rows):
        columns: Columns = [("sparsity", lambda same: f"{same[0]['sparsity']:g}")]
        for i, (gate, scale) in enumerate(swept):
            columns.append((f"{gate}, scale {scale:g}", lambda same, i=i: fill("{test:error} ({rate:g})", same[i])))
        parts += [
            "Test accuracy by sparsity, %, each gate at the scale and each cell at the (rate) that validation chose; "
            f"at sparsity 0 nothing competes, and the scale is {DEFAULT_SCALES['none']:g}:",
            table(columns, zip(*swept.values(), strict=True)),
        ]
    return "\n\n".join([*parts, made_by(document)])


def draw(path: Path, document: Document) -> None:
    """Test accuracy against sparsity, where that was swept, and validation accuracy against the learning rate."""
    rows, panels = document["rows"], []
    if swept := sweep(rows):
        lora, sparsities = rows[0]["test"], [row["sparsity"] for row in next(iter(swept.values()))]
        level = [[fmean(lora) + sign * standard_error(lora)] * len(sparsities) for sign in (0, -1, 1)]
        series = [Series(level[0], None, *METHODS["lora"], "--", band=level[1:])]
        for i, ((gate, scale), same) in enumerate(swept.items()):
            x = [place + 0.07 * (i - 1) for place in range(len(same))]
            means, errors = ([of(row["test"]) for row in same] for of in (fmean, standard_error))
            series.append(Series(means, x, f"{gate}, scale {scale:g}", COLOURS[gate], "o-", errors))
        title = "test accuracy, %, each at its best rate\n(bars and band: standard error over draws of labels)"
        ticks = {i: f"{sparsity:g}" for i, sparsity in enumerate(sparsities)}
        panels.append(Panel(title, series, "sparsity (share of dW's entries that are zero)", ticks=ticks, legend={}))
    series, looks = [], iter("v^o" * 3)
    for row in reference_rows(rows):
        plain = row["scale"] is None
        label, look = ("LoRA", "s--") if plain else (f"{row['gate']}, {row['scale']:g}", f"{next(looks)}-")
        series.append(Series([*map(fmean, row["validation"])], row["rates"], label, COLOURS[row["gate"]], look))
    sparsity = rows[1]["sparsity"]
    title = f"validation accuracy at sparsity {sparsity:g}, %, by gate and scale\n(means over draws of labels)"
    ticks = {rate: f"{rate:g}" for rate in document["plan"]["rates"]}
    panels.append(Panel(title, series, "learning rate", log="x", ticks=ticks, ylim=(0, None), legend={"ncols": 2}))
    task = {"digits": "a small ViT on digits", "text": "MiniLM on docstrings"}[document["task"]]
    picture(path, f"Gates, scales and learning rates: {task}", [panels], height=5.2)
