"""What growth shows: slopes on a log-log plot, predictions beside measurements, and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def clock_of(measured: Mapping[str, Sequence[Row]]) -> float:
    """Seconds of the calibration's GEMM, the median over all points."""
    return statistics.median(row["clock_seconds"] for rows in measured.values() for row in rows)


def slopes(measured: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float | None]]:
    """For each axis the slope of every time and every size of memory; None where one cannot be fitted."""
    clock, found = clock_of(measured), {}
    for axis, (_, place) in AXES.items():
        rows = measured[axis]
        places = [place(row) for row in rows]
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
    columns += ("with one GEMM rate", "of the floor", "of LoRA", "extra peak / predicted")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for axis, rows in measured.items():
        for row in rows:
            ratio, taken = row["measured_over_predicted"], row["seconds"]["snell"]
            marked = f"{ratio:.2f}" if within_tolerance(ratio) else f"**{ratio:.2f}, off**"
            sizes = bytes_of(row)
            extra = "-" if sizes["snell extra"] is None else f"{sizes['snell extra'] / sizes['model extra']:.2f}"
            lines.append(
                f"| {axis} | {row['in_features']} x {row['out_features']} | {row['rank']} | {row['tokens']} "
                f"| {row['sparsity']:g} | {row['depth']} | {2 if row['survivors_products_alone'] else 3} "
                f"| {taken * 1e3:.3g} ms | {taken / ratio * 1e3:.3g} ms | {marked} "
                f"| {row['measured_over_predicted_single_rate']:.2f} | {row['snell_over_floor']:.2f} "
                f"| {row['snell_over_lora']:.2f} | {extra} |"
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
