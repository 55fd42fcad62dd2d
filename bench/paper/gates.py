"""Which gate, scale, sparsity and learning rate: SNELL's defaults, chosen by evidence.

    snell bench gates

The task is the demonstration's transfer. ``snell study classify`` compares gates and sparsities on larger data.

A candidate is a gate, a scale and a sparsity; LoRA (PEFT) is one more. The protocol, the same for all:

1. At each learning rate of the grid it is trained on some draws of labels; the mean accuracy on validation data chooses
   its rate.
2. It is trained at that rate alone on other draws, the same for all candidates, and these models meet the test set:
   once. The mean over the draws is its result, with its standard error; since the draws are shared, so is the
   difference from LoRA, draw by draw.

First every gate at every scale, at sparsity 0.9. Then every gate over the sparsities, at the scale where its
validation accuracy was best: from 0.9 up and down, each climbing the grid of rates from the one that its neighbour
chose until the rates on both sides are worse. At sparsity 0 nothing competes, so that one row (gate "none", at its own
default scale) serves all gates. Validation and test data are the same for every draw: the standard errors are of the
draws alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from snell import spec
from snell.bench.contenders import quiet_libraries
from snell.bench.digits import RANK, Settings, Transfer, lora, snell
from snell.bench.names import METHODS
from snell.bench.protocol import Job, judged
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

#: Those that compete.
GATES = tuple(gate for gate in spec.GATES if gate != "none")
#: Where the scales are compared.
SPARSITY = 0.9


class Candidate(NamedTuple):
    """SNELL's settings; LoRA has none of them."""

    gate: str
    scale: float | None = None
    sparsity: float | None = None


LORA = Candidate("LoRA")

#: The accuracy in percent of a candidate trained and judged as the job says; and of several jobs.
Train = Callable[[Candidate, Job], float]
Measure = Callable[[Candidate, Sequence[Job]], Sequence[float]]


@dataclass(frozen=True)
class Plan:
    """What is tried; ``rates`` ascend. ``selection`` and ``judging`` number the draws of labels; they share none."""

    rates: tuple[float, ...]
    scales: tuple[float, ...]
    sparsities: tuple[float, ...]
    selection: tuple[int, ...]
    judging: tuple[int, ...]
    gates: tuple[str, ...] = GATES


RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SCALES, SPARSITIES = (0.1, 1.0, 3.0), (0.0, 0.5, 0.8, SPARSITY, 0.95, 0.99)
# The demonstration judges with draws 0 to 2.
PLAN = Plan(RATES, SCALES, SPARSITIES, selection=tuple(range(10, 15)), judging=tuple(range(30, 38)))


def digits(settings: Settings | None = None) -> tuple[dict[str, Any], Train]:
    """The demonstration's transfer: a draw decides labels, batches, new head and factors."""
    transfer = Transfer(settings)

    def train(candidate: Candidate, job: Job) -> float:
        build = lora if candidate == LORA else partial(snell, **candidate._asdict())
        return transfer.accuracies(build, [job])[0]

    labels = f"{transfer.settings.labels_per_class} a class"
    shown = {"steps": transfer.settings.steps, "labels": labels, "rank and LoRA's alpha": RANK}
    parts = {part: getattr(transfer.domains, f"target_{part}") for part in ("validation", "test")}
    return shown | {part: f"{len(images)} images" for part, images in parts.items()}, train


@cache
def _task() -> tuple[dict[str, Any], Train]:
    """The task, prepared once in each process."""
    quiet_libraries()
    return digits()


def _accuracy(candidate: Candidate, job: Job) -> float:
    return _task()[1](candidate, job)


@contextmanager
def measuring(workers: int) -> Iterator[tuple[dict[str, Any], Measure]]:
    """The task's settings, and a measure whose jobs are shared among ``workers`` processes of one thread each."""
    # Forked processes would inherit the locks of torch's threads.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield _task()[0], lambda candidate, jobs: list(pool.map(partial(_accuracy, candidate), jobs))


def try_all(plan: Plan, measure: Measure) -> list[dict[str, Any]]:
    """A row for every candidate, LoRA's first."""
    rows: dict[Candidate, dict[str, Any]] = {}
    total = 1 + len(plan.gates) * (len(plan.scales) + len(plan.sparsities) - 1)
    with tqdm(total=total, unit="candidate") as bar:

        def add(candidate: Candidate, start: Sequence[float]) -> dict[str, Any]:
            if candidate not in rows:
                row = judged(partial(measure, candidate), plan.rates, plan.selection, plan.judging, start)
                rows[candidate] = candidate._asdict() | row
            bar.update()
            return rows[candidate]

        add(LORA, plan.rates)
        best = {}
        for gate in plan.gates:
            compared = [add(Candidate(gate, scale, SPARSITY), plan.rates) for scale in plan.scales]
            best[gate] = max(compared, key=lambda row: max(map(fmean, row["validation"])))
        for gate, reference in best.items():
            below = sorted((s for s in plan.sparsities if s < SPARSITY), reverse=True)
            for outward in (below, sorted(s for s in plan.sparsities if s > SPARSITY)):
                near = reference
                for sparsity in outward:
                    settings = (gate, reference["scale"]) if sparsity else ("none", spec.DEFAULT_SCALES["none"])
                    near = add(Candidate(*settings, sparsity), [near["rate"]])
    return list(rows.values())


def measure(workers: int) -> dict[str, Any]:
    """The plan, carried out."""
    with measuring(workers) as (settings, measured):
        rows = try_all(PLAN, measured)
    return {"settings": settings, "plan": asdict(PLAN), "rows": rows}


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
            f"at sparsity 0 nothing competes, and the scale is {spec.DEFAULT_SCALES['none']:g}:",
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
    picture(path, "Gates, scales and learning rates: a small ViT on digits", [panels], height=5.2)
