"""How accuracies are compared: validation data choose the learning rate, test data judge the method at that rate.

Beside it the schedule that all trainings here share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch


class Job(NamedTuple):
    """A training at a learning rate with a draw of labels, judged on one part of the data."""

    rate: float
    draw: int
    part: str  # "validation" or "test"


#: The accuracy of each job, in percent.
Measure = Callable[[Sequence[Job]], Sequence[float]]


def judged(
    measure: Measure,
    rates: Sequence[float],
    choosing: Sequence[int],
    judging: Sequence[int],
    start: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Choose a rate by its mean validation accuracy over some draws of labels; judge it on test data with others.

    Args:
        rates: the grid, ascending.
        start: the rates to try first, all unless given; more follow while the best has an untried one beside it.

    Returns:
        ``rates`` that were tried, ``validation`` accuracies by rate and draw, the ``rate`` they chose, and the ``test``
        accuracies at it by draw.
    """
    found: dict[float, list[float]] = {}
    untried = list(rates if start is None else start)
    while untried:
        jobs = [Job(rate, draw, "validation") for rate in untried for draw in choosing]
        for job, accuracy in zip(jobs, measure(jobs), strict=True):
            found.setdefault(job.rate, []).append(accuracy)
        best = max(sorted(found), key=lambda rate: fmean(found[rate]))
        position = rates.index(best)
        untried = [rate for rate in rates[max(position - 1, 0) : position + 2] if rate not in found]
    tried = sorted(found)
    test = list(measure([Job(best, draw, "test") for draw in judging]))
    return {"rates": tried, "validation": [found[rate] for rate in tried], "rate": best, "test": test}


def at_edge(row: dict[str, Any]) -> bool:
    """Whether the chosen rate is the lowest or the highest that was tried."""
    return row["rate"] in (row["rates"][0], row["rates"][-1])


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule: the rates warm up over a tenth of the steps, then fall along a cosine."""
    warmup = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    )
