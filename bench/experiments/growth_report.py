"""What growth shows: slopes on a log-log plot, predictions beside measurements, and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snell.bench.names import METHODS
from snell.bench.report import Cell, Columns, Document, Panel, Series, made_by, picture, table

#: A measured time within this share of the prediction is as the design asks.
TOLERANCE = 0.2

Row = Mapping[str, Any]

#: What an axis plots: its label, and a row's place on it. Sparsity stands as the share that survives.
AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "m*n": ("m·n, entries of the weight", lambda row: row["in_features"] * row["out_features"]),
    "rank": ("rank r", lambda row: row["rank"]),
    "tokens": ("tokens T", lambda row: row["tokens"]),
    "survivors": ("share that survives, 1 - s", lambda row: 1 - row["sparsity"]),
    "depth": ("depth, layers", lambda row: row["depth"]),
}

SNELL, LORA, FLOOR = METHODS["snell"].colour, METHODS["lora"].colour, METHODS["full"].colour


def slope(xs: Sequence[float], ys: Sequence[float | None]) -> float | None:
    """The least-squares slope of log y over log x; None where a y is None or 0."""
    if not all(ys):
        return None
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def times_of(row: Row, clock: float) -> dict[str, float]:
    """Seconds by name, as if a GEMM of the calibration size had taken ``clock`` seconds at this point too."""
    scale = clock / row["clock_seconds"]
    model = row["seconds"]["snell"] / row["measured_over_predicted"]
    return {name: scale * seconds for name, seconds in (row["seconds"] | {"model": model}).items()}


def bytes_of(row: Row) -> dict[str, float | None]:
    """Bytes by name; None where the system does not tell."""
    predicted, memory = row["predicted_bytes"], row["memory"]
    return {
        "snell saved": memory["snell"]["saved_bytes"],
        "model saved": predicted["saved"],
        "lora saved": memory["lora"]["saved_bytes"],
        "snell extra": memory["snell"]["extra_peak_bytes"],
        "model extra": predicted["outputs"] + predicted["workspace"],
        "lora extra": memory["lora"]["extra_peak_bytes"],
    }


def clock_of(measured: Mapping[str, Sequence[Row]]) -> float:
    """Seconds of the calibration's GEMM, the median over all points."""
    return statistics.median(row["clock_seconds"] for rows in measured.values() for row in rows)


def slopes(measured: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """For each axis the slope of every time and every size of memory."""
    clock, found = clock_of(measured), []
    for axis, (label, place) in AXES.items():
        columns = [times_of(row, clock) | bytes_of(row) for row in measured[axis]]
        places = [place(row) for row in measured[axis]]
        found.append({"axis": label} | {name: slope(places, [c[name] for c in columns]) for name in columns[0]})
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


def within_tolerance(ratio: float) -> bool:
    """Whether measured over predicted is as close to 1 as the design asks."""
    return abs(ratio - 1) <= TOLERANCE


def _prediction(axis: str, row: Row) -> Row:
    """What the second table adds to a row; a time out of the tolerance is marked in bold."""
    ratio, sizes = row["measured_over_predicted"], bytes_of(row)
    extra = sizes["snell extra"] and sizes["snell extra"] / sizes["model extra"]
    marked = f"{ratio:.2f}" if within_tolerance(ratio) else f"**{ratio:.2f}, off**"
    facts = {"axis": axis, "gemms": 2 if row["survivors_products_alone"] else 3, "extra": extra, "ratio": marked}
    return {**row, **facts, "predicted": row["seconds"]["snell"] / ratio}


PREDICTION_COLUMNS: Columns = [
    ("axis", "{axis}"),
    ("in x out", "{in_features} x {out_features}"),
    ("r", "{rank}"),
    ("T", "{tokens}"),
    ("s", "{sparsity:g}"),
    ("layers", "{depth}"),
    ("GEMMs", "{gemms}"),
    ("measured", "{seconds[snell]:ms}"),
    ("predicted", "{predicted:ms}"),
    ("measured / predicted", "{ratio}"),
    ("with one GEMM rate", "{measured_over_predicted_single_rate:.2f}"),
    ("of the floor", "{snell_over_floor:.2f}"),
    ("of LoRA", "{snell_over_lora:.2f}"),
    ("extra peak / predicted", "{extra:.2f}"),
]


def summary(measured: Mapping[str, Sequence[Row]]) -> str:
    """How many points lie within the tolerance, in one sentence."""
    point = ("in_features", "out_features", "rank", "tokens", "sparsity", "depth")
    rows = list({tuple(row[key] for key in point): row for rows in measured.values() for row in rows}.values())
    at_point, single = ([row[f"measured_over_predicted{key}"] for row in rows] for key in ("", "_single_rate"))
    count, count_single = (sum(map(within_tolerance, ratios)) for ratios in (at_point, single))
    worst = max(at_point, key=lambda ratio: abs(math.log(ratio)))
    return (
        f"Within {TOLERANCE:.0%} of the prediction: {count} of {len(rows)} points; {count_single} of {len(rows)} "
        f"points with one GEMM rate. Furthest off: {worst:.2f}."
    )


def prediction_table(measured: Mapping[str, Sequence[Row]]) -> str:
    """Measured beside predicted."""
    return table(PREDICTION_COLUMNS, (_prediction(axis, row) for axis, rows in measured.items() for row in rows))


def report(document: Document) -> str:
    """The results file as Markdown."""
    measured = document["axes"]
    tables = table(SLOPE_COLUMNS, slopes(measured)), prediction_table(measured)
    return "\n\n".join([*tables, summary(measured), made_by(document)])


def _time_panel(axis: str, rows: Sequence[Row], clock: float) -> Panel:
    (label, place), times = AXES[axis], [times_of(row, clock) for row in rows]
    # Rounded, as 1 - 0.9 is not quite 0.1.
    xs = [round(place(row), 6) for row in rows]
    model, snell, lora, floor = ([1e3 * t[name] for t in times] for name in ("model", "snell", "lora", "floor"))
    band = [t * (1 - TOLERANCE) for t in model], [t * (1 + TOLERANCE) for t in model]
    series = [
        Series(model, xs, f"cost model, ± {TOLERANCE:.0%}", SNELL, band=band),
        Series(snell, xs, "SNELL, measured", SNELL, "o"),
        Series(lora, xs, "PEFT LoRA", LORA, "s--", style={"linewidth": 1, "markersize": 4}),
        Series(floor, xs, "floor: three GEMMs", FLOOR, ":"),
    ]
    ticks = None if axis == "m*n" else {x: f"{x:g}" for x in xs}
    shown = floor + snell + lora
    # At least most of a decade, so that a flat line looks flat.
    ylim = min(min(shown) / 1.2, max(shown) / 8), max(shown) * 1.2
    return Panel("time of a step", series, label, "forward + backward, ms", "xy", ticks, ylim)


def _memory_panel(rows: Sequence[Row]) -> Panel:
    label, place = AXES["m*n"]
    xs, sizes, series = [place(row) for row in rows], [bytes_of(row) for row in rows], []
    for kind, meaning, style in (("extra", "extra peak", {}), ("saved", "kept", {"fillstyle": "none", "alpha": 0.5})):
        for who, look, colour in (("SNELL", "o", SNELL), ("model", "-", SNELL), ("LoRA", "s", LORA)):
            counts = [size[f"{who.lower()} {kind}"] or math.nan for size in sizes]
            series.append(Series([c / 2**20 for c in counts], xs, f"{who}, {meaning}", colour, look, style=style))
    series.append(Series([4 * x / 2**20 for x in xs], xs, "a float32 matrix of m·n", FLOOR, ":"))
    # Room for the legend.
    ylim, legend = (0.1, None), {"fontsize": 8, "ncols": 2, "loc": "lower right"}
    return Panel("memory of a step", series, label, "MiB", "xy", ylim=ylim, legend=legend)


def draw(path: Path, document: Document) -> None:
    """Time along every axis with the model's line, and memory along m*n; all log-log."""
    measured, clock = document["axes"], clock_of(document["axes"])
    rows = {axis: sorted(measured[axis], key=place) for axis, (_, place) in AXES.items()}
    panels = [*(_time_panel(axis, rows[axis], clock) for axis in AXES), _memory_panel(rows["m*n"])]
    panels[0].legend = {"fontsize": 8}
    title = "How a layer's training step grows, measured and predicted"
    picture(path, title, [panels[:3], panels[3:]], 4.8, 4)
