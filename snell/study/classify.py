"""What ``snell study classify`` runs, reports and draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from snell.bench.contenders import quiet_libraries
from snell.bench.names import METHODS
from snell.bench.report import Columns, Document, made_by, picture, publish, standard_error, table
from snell.study import TASKS, comparison, images, text
from snell.study.comparison import Comparison
from snell.study.journal import Journal
from snell.study.methods import Method
from snell.study.training import BATCH, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: A setting, the row of each method, and whether all of them are complete.
Compared = tuple[Setting, list[dict[str, Any]], bool]


def compare(
    settings: Sequence[Setting],
    methods: Sequence[Method],
    *,
    out: Path,
    checkpoint: Path | None,
    data: Mapping[str, Path],
    draws: int,
    error: float,
    finer: bool,
    threads: int,
    max_minutes: float | None,
) -> tuple[Mapping[str, str], list[Compared]]:
    """Compare the methods in each setting of one task. Returns the task's facts, and what was found."""
    torch.set_num_threads(threads)
    quiet_libraries()
    [name] = {setting.task for setting in settings}
    runs = (
        len(settings)
        * len(methods)
        * (5 + 2 * (len(comparison.CHOOSING) - 1) + finer * 2 * len(comparison.CHOOSING) + draws)
    )
    deadline = None if max_minutes is None else time.process_time() + 60 * max_minutes
    found: list[Compared] = []
    with Journal(out / f"classify-{name}.jsonl") as journal, tqdm(total=runs, unit="run", desc=name) as bar:
        for depth, group in groupby(settings, lambda setting: setting.layers):
            if name == "fashion":
                task = images.load(data.get(name), data.get("fonts"), depth, out / f"glyphs-{depth}.pt")
            else:
                task = text.load(name, data.get(name), depth, checkpoint)
            study = Comparison(task, task.backbone(), journal, bar, deadline, finer, error)
            found += [(setting, *study.rows(setting, methods, draws)) for setting in group]
    return task.facts, found


def run(
    out: Path,
    tasks: Sequence[str],
    methods: Sequence[Method],
    ranks: Sequence[int],
    labels: int | None,
    per_class: int | None,
    steps: int,
    layers: int | None,
    draws: int,
    **how: Any,
) -> None:
    """Compare the methods on each task, and publish ``classify-TASK.json`` or ``classify-TASK-finer.json``."""
    for name in tasks:
        settings = [Setting(name, layers or TASKS[name], rank, labels, per_class, steps) for rank in ranks]
        facts, results = compare(settings, methods, out=out, draws=draws, **how)
        document = _document(name, facts, results, draws)
        if how["finer"]:
            document["file"] += "-finer"
        publish(out, "classify", sys.modules[__name__], document, program="snell study classify")


def shown_settings(facts: Mapping[str, str], setting: Setting, draws: int) -> dict[str, Any]:
    """What a reader should know of a setting."""
    shown = {"labels": setting.labels or f"{setting.per_class} a class", "steps": setting.steps, "batch": BATCH}
    return {**facts, **shown, "draws to choose": len(comparison.CHOOSING), "at most to judge": draws}


def _document(name: str, facts: Mapping[str, str], results: Sequence[Compared], draws: int) -> dict[str, Any]:
    return {
        "file": f"classify-{name}",
        "task": name,
        "settings": shown_settings(facts, results[0][0], draws),
        "comparisons": [{"rank": s.rank, "complete": whole, "rows": rows} for s, rows, whole in results],
    }


def signed(values: Sequence[float]) -> str:
    """A difference's mean and standard error."""
    return f"{fmean(values):+.2f} ± {standard_error(values):.2f}"


COLUMNS: Columns = [
    ("method", "{label}"),
    ("test accuracy, %", lambda row: f"{fmean(row['test']):.2f} ± {standard_error(row['test']):.2f}"),
    ("difference from LoRA, points", lambda row: signed(row["difference"]) if "difference" in row else ""),
    ("draws", lambda row: str(len(row["test"]))),
    ("learning rate", "{rate:g}"),
    ("trained parameters", "{trained:,}"),
    ("processor time of a step", "{seconds:ms}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    parts = []
    for one in document["comparisons"]:
        unfinished = "" if one["complete"] else " (unfinished)"
        parts += [f"Rank {one['rank']}{unfinished}:", table(COLUMNS, one["rows"])] if one["rows"] else []
    return "\n\n".join([*parts, "Mean ± standard error over the draws.", made_by(document)])


def draw(path: Path, document: Document) -> None:
    """The difference from LoRA of each method, with its standard error."""
    panels = [partial(_differences, one) for one in document["comparisons"] if one["rows"]]
    if panels:
        picture(path, f"Accuracy by method: {document['task']}", [panels], width=8, height=4.2)


def _differences(one: Mapping[str, Any], axes: Axes) -> None:
    rows = [row for row in one["rows"] if "difference" in row]
    for place, row in enumerate(reversed(rows)):
        colour = METHODS["snell"].colour if row["method"].startswith("snell") else METHODS["full"].colour
        axes.errorbar(fmean(row["difference"]), place, xerr=standard_error(row["difference"]), fmt="o", color=colour)
    axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
    axes.axvline(0, color=METHODS["lora"].colour)
    axes.set_xlabel("accuracy - LoRA's, points (bars: standard error over draws)")
    axes.set_title(f"rank {one['rank']}", loc="left", fontsize=11)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
