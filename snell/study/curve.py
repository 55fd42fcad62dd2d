"""What ``snell study curve`` runs, reports and draws: the difference from LoRA as one setting varies."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from snell.bench.report import Document, Panel, Series, made_by, picture, plain_table, publish, standard_error
from snell.study import TASKS
from snell.study.classify import compare, shown_settings, signed
from snell.study.methods import Method
from snell.study.training import Setting

#: What ``--over`` may name: the setting, and its name in the report.
FIELDS = {
    "rank": ("rank", "rank"),
    "labels": ("labels", "labels"),
    "per-class": ("per_class", "labels a class"),
    "layers": ("layers", "layers"),
    "steps": ("steps", "steps"),
}

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")


def run(
    out: Path,
    task: str,
    over: str,
    values: Sequence[int],
    methods: Sequence[Method],
    rank: int,
    labels: int | None,
    per_class: int | None,
    steps: int,
    layers: int | None,
    draws: int,
    **how: Any,
) -> None:
    """Compare the methods at each value, and publish ``curve-TASK-OVER.json``."""
    if over in ("labels", "per-class"):
        labels = per_class = None
    field, name = FIELDS[over]
    fixed = Setting(task, layers or TASKS[task], rank, labels, per_class, steps)
    varied: list[dict[str, Any]] = [{field: value} for value in values]
    settings = [replace(fixed, **one) for one in varied]
    facts, results = compare(settings, methods, out=out, draws=draws, **how)
    shown = {**shown_settings(facts, settings[0], draws), "rank": rank}
    shown.pop("labels" if field == "per_class" else field)
    points = [
        {"value": value, "complete": whole, "rows": rows}
        for value, (_, rows, whole) in zip(values, results, strict=True)
    ]
    document = {"file": f"curve-{task}-{over}", "task": task, "over": name, "settings": shown, "points": points}
    publish(out, "curve", sys.modules[__name__], document, program="snell study curve")


def _by_method(document: Document) -> Iterator[tuple[str, list[Mapping[str, Any] | None]]]:
    """Each method's label with its row at every value; None where it has none."""
    labels = dict.fromkeys(row["label"] for point in document["points"] for row in point["rows"])
    for label in labels:
        rows = [[row for row in point["rows"] if row["label"] == label] for point in document["points"]]
        yield label, [row[0] if row else None for row in rows]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "difference" in row:
        return signed(row["difference"])
    return f"{fmean(row['test']):.2f} ± {standard_error(row['test']):.2f} %"


def report(document: Document) -> str:
    """The results file as Markdown."""
    headings = [f"{document['over']}: {point['value']:,}" for point in document["points"]]
    rows = [[label, *map(_cell, rows)] for label, rows in _by_method(document)]
    note = "LoRA's test accuracy; the others' difference from it in points. Mean ± standard error over the draws."
    unfinished = "" if all(point["complete"] for point in document["points"]) else "Unfinished. "
    return "\n\n".join([plain_table(["method", *headings], rows), unfinished + note, made_by(document)])


def draw(path: Path, document: Document) -> None:
    """The difference from LoRA of each method over the values."""
    series: list[Series] = []
    for label, rows in _by_method(document):
        known = [
            (point["value"], row["difference"])
            for point, row in zip(document["points"], rows, strict=True)
            if row is not None and "difference" in row
        ]
        if known:
            values, differences = zip(*known, strict=True)
            errors, means = list(map(standard_error, differences)), list(map(fmean, differences))
            series.append(Series(means, values, label, COLOURS[len(series) % len(COLOURS)], "o-", errors))
    ticks = {point["value"]: f"{point['value']:,}" for point in document["points"]}
    title = "accuracy - LoRA's, points (bars: standard error)"
    panel = Panel(title, series, document["over"], log="x", ticks=ticks, level=0.0)
    picture(path, f"{document['task']}: over {document['over']}", [[panel]], width=7)
