"""How survivors and gradients move while SNELL trains, by gate and start.

    snell study dynamics --rank 8

Trains on WordNet as ``snell study classify`` does, at the rates that it chose. Before every step it compares the
survivors with those of the step before. Every fifth step it compares them with those at the end, and takes the root
mean square of the loss's gradient over survivors and over losers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from snell.bench.report import Columns, Document, Panel, Series, made_by, picture, publish, table
from snell.cli.options import out_option
from snell.study.command import data_option

#: What is watched, at the rate that classify chose for it on WordNet at rank 8, in its colour (Okabe and Ito's).
WATCHED = {
    "snell": (0.005, "#0072b2"),
    "snell:gate=magnitude": (0.002, "#e69f00"),
    "snell:gate=hard": (0.02, "#d55e00"),
    "snell:init_weights=identity": (0.002, "#009e73"),
}


@click.command(help=__doc__)
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Columns of the factors.")
@click.option("--steps", type=click.IntRange(2), default=120, show_default=True, help="Training steps.")
@click.option("--draws", type=click.IntRange(1), default=3, show_default=True, help="Trainings of each, averaged.")
@click.option("--labels", type=click.IntRange(1), default=3840, show_default=True, help="Labels to learn from.")
@click.option(
    "--layers", type=click.IntRange(1), default=3, show_default=True, help="Of the checkpoint's first layers."
)
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Another than MiniLM: a folder.")
@data_option
@out_option
def main(out: Path, data: Mapping[str, Path], checkpoint: Path | None, layers: int, **settings: int) -> None:
    from snell.bench.contenders import quiet_libraries
    from snell.study import text

    quiet_libraries()
    task = text.load("wordnet", data.get("wordnet"), layers, checkpoint)
    backbone = task.backbone()
    methods = {
        name: [_train(task, backbone, name, draw, settings) for draw in range(settings["draws"])] for name in WATCHED
    }
    document = {"settings": {**task.facts, **settings}, "methods": methods}
    publish(out, "dynamics", sys.modules[__name__], document, program="snell study dynamics")


def _train(task: Any, backbone: Any, name: str, draw: int, settings: Mapping[str, int]) -> dict[str, Any]:
    """Train one method on one draw. Returns the figures of its :class:`~snell.study.survivors.Watch`."""
    from snell.bench.protocol import cosine
    from snell.study.methods import parse
    from snell.study.survivors import Watch
    from snell.study.training import BATCH, built, fit, optimizer_of

    steps, method = settings["steps"], parse(name)
    model = built(backbone, task.classes, method, settings["rank"], draw).eval()
    watch, optimizer = Watch(model), optimizer_of(model, method, WATCHED[name][0])
    order = task.draw(draw, settings["labels"], None, steps, BATCH, "validation:1").order

    def batches() -> Iterator[Any]:
        for step, examples in enumerate(order.split(BATCH)):
            batch = task.inputs(examples), task.labels[examples]
            if watch.look(step, last=step == steps - 1):
                with watch.step():
                    yield batch
            else:
                yield batch

    fit(model, optimizer, cosine(optimizer, steps), batches())
    return {"replaced": watch.replaced, "steps": watch.looked, "final": watch.final(), **watch.gradients}


def _label(name: str) -> str:
    from snell.study.methods import parse

    return parse(name).label


def _mean(draws: list[dict[str, Any]], figure: str) -> list[float]:
    return [fmean(values) for values in zip(*(draw[figure] for draw in draws), strict=True)]


def _ratio(draws: list[dict[str, Any]]) -> list[float]:
    """Survivors' gradient over losers', at each look."""
    pairs = [zip(draw["survivors"], draw["losers"], strict=True) for draw in draws]
    return [fmean(ratios) for ratios in zip(*([s / max(l, 1e-30) for s, l in pair] for pair in pairs), strict=True)]


COLUMNS: Columns = [
    ("method", "{label}"),
    ("learning rate", "{rate:g}"),
    ("survivors replaced in a step: first, median, last", "{replaced[0]:.1%}, {replaced[1]:.2%}, {replaced[2]:.2%}"),
    ("of the final survivors: at the start, a quarter, half", "{final[0]:.0%}, {final[1]:.0%}, {final[2]:.0%}"),
    ("gradient of survivors over losers': first, last", "{ratio[0]:.2f}, {ratio[1]:.2f}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    rows = []
    for name, draws in document["methods"].items():
        replaced, final, ratio = _mean(draws, "replaced"), _mean(draws, "final"), _ratio(draws)
        places = [0, len(final) // 4, len(final) // 2]
        rows.append(
            {
                "label": _label(name),
                "rate": WATCHED[name][0],
                "replaced": [replaced[0], sorted(replaced)[len(replaced) // 2], replaced[-1]],
                "final": [final[place] for place in places],
                "ratio": [ratio[0], ratio[-1]],
            }
        )
    return f"{table(COLUMNS, rows)}\n\n{made_by(document)}"


def draw(path: Path, document: Document) -> None:
    """Survivors replaced a step, the way to the final survivors, and gradients of survivors and losers."""
    panels: dict[str, list[Series]] = {"replaced": [], "final": [], "ratio": []}
    for name, draws in document["methods"].items():
        look: dict[str, Any] = {"label": _label(name), "colour": WATCHED[name][1]}
        replaced, steps = _mean(draws, "replaced"), draws[0]["steps"]
        panels["replaced"].append(Series([100 * share for share in replaced], range(1, len(replaced) + 1), **look))
        panels["final"].append(Series([100 * share for share in _mean(draws, "final")], steps, **look))
        panels["ratio"].append(Series(_ratio(draws), steps, **look))
    shown = [
        Panel("survivors replaced in a step, %", panels["replaced"], "step"),
        Panel("final survivors that survive already, %", panels["final"], "step", ylim=(0, 100)),
        Panel("gradient of survivors over losers'", panels["ratio"], "step", level=1.0, ylim=(0, None)),
    ]
    picture(path, "Who survives while SNELL trains", [shown], 4.8, 4)
