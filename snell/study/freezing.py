"""Selective freezing (SAFE) on MiniLM and WordNet, beside the same run without it.

    snell study freezing

Trains all of MiniLM's layers on WordNet as ``snell study classify`` trains its first three, at the rates that it chose
for these, and measures what ``snell bench freezing`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from snell.bench.experiments import freezing
from snell.bench.report import publish
from snell.cli.options import out_option
from snell.study.command import data_option

#: Chosen for WordNet at rank 8, over three layers.
RATES = {"snell": 0.0032, "lora": 0.005}


@click.command(help=__doc__)
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Columns of the factors.")
@click.option("--steps", type=click.IntRange(2), default=240, show_default=True, help="Training steps.")
@click.option("--draws", type=click.IntRange(2), default=4, show_default=True, help="Trainings of each.")
@click.option("--labels", type=click.IntRange(1), default=3840, show_default=True, help="Labels to learn from.")
@click.option("--judged", type=click.IntRange(1), default=3000, show_default=True, help="Test examples.")
@click.option("--layers", type=click.IntRange(1), default=6, show_default=True, help="Of the checkpoint's layers.")
@click.option("--share", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="What is frozen at the end.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Threads of this process.")
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Another than MiniLM: a folder.")
@data_option
@out_option
def main(
    out: Path,
    data: Mapping[str, Path],
    checkpoint: Path | None,
    layers: int,
    draws: int,
    share: float,
    threads: int,
    **settings: int,
) -> None:
    from snell.study import text

    torch.set_num_threads(threads)
    task = text.load("wordnet", data.get("wordnet"), layers, checkpoint)
    document = freezing.measure(draws, share, on_text(task, **settings))
    publish(out, "freezing", freezing, {**document, "file": "freezing-wordnet"}, program="snell study freezing")


def on_text(task: Any, rank: int, steps: int, labels: int, judged: int) -> freezing.Task:
    """The task of :mod:`snell.bench.experiments.freezing` that a study's task makes."""
    from snell.study.methods import parse
    from snell.study.training import BATCH, accuracy, built, optimizer_of

    backbone = task.backbone()
    test = task.draw(0, labels, None, steps, BATCH, f"test:{judged}").judge

    def order(seed: int) -> tuple[Tensor, ...]:
        return task.draw(seed, labels, None, steps, BATCH, "validation:1").order.split(BATCH)

    def loss(model: nn.Module, batch: tuple[Mapping[str, Tensor], Tensor]) -> Tensor:
        inputs, classes = batch
        return nn.functional.cross_entropy(model(**inputs), classes)

    return freezing.Task(
        steps,
        {**task.facts, "rank": rank, "labels": labels, "rates": RATES},
        # Without dropout, as in the other studies.
        build=lambda method, seed: built(backbone, task.classes, parse(method), rank, seed).eval(),
        optimizer=lambda model, method: optimizer_of(model, parse(method), RATES[method]),
        loss=loss,
        batches=lambda seed: ((task.inputs(examples), task.labels[examples]) for examples in order(seed)),
        calibration=lambda seed: dict(task.inputs(order(seed)[0])),
        accuracy=lambda model: accuracy(model, task, test),
    )
