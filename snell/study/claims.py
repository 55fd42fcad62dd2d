"""What arXiv 2205.11277 says of tuning within budgets, answered from a study's figures by a rule.

A figure is a mean of paired differences of chrF: over draws in each pair of languages, then over the pairs. Its
interval is Student's at 95 % on the draws' spread within the pairs. A claim is answered yes where the whole interval is
above the threshold, no where it is below, and otherwise not decided. So is one whose runs are not all there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

#: A method that is less than so many points of chrF behind full fine-tuning is on par with it.
PAR = 1.0

Differences = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom of that error."""

    mean: float
    error: float
    freedom: int

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two that share no draw."""
        error = math.hypot(self.error, other.error)
        return Estimate(self.mean - other.mean, error, self.freedom + other.freedom)

    @property
    def half(self) -> float:
        """Half the length of the interval."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.freedom)) * self.error

    def above(self, threshold: float) -> str:
        """``"yes"``, ``"no"`` or ``"not decided"``."""
        if self.mean - self.half > threshold:
            return "yes"
        return "no" if self.mean + self.half < threshold else "not decided"


def pooled(differences: Differences) -> Estimate:
    """The mean over pairs of the means over draws. ``differences``: of each pair, by draw."""
    spread = sum(variance(some) / len(some) for some in differences)
    freedom = sum(len(some) - 1 for some in differences)
    return Estimate(fmean(map(fmean, differences)), math.sqrt(spread) / len(differences), freedom)


class _Missing(Exception):
    """A run that a claim needs is not there."""


class _Figures:
    """chrF by draw of every cell."""

    def __init__(self, comparisons: Sequence[Mapping[str, Any]]) -> None:
        self.kinds = {one["pair"]: one["kind"] for one in comparisons}
        self.budgets = sorted({one["budget"] for one in comparisons})
        self.sentences = sorted({one["sentences"] for one in comparisons})
        self.cells = {
            (one["pair"], one["sentences"], one["budget"], row["method"]): row["test"]
            for one in comparisons
            for row in one["rows"]
        }
        self.draws = max((len(test) for test in self.cells.values()), default=0)

    def difference(self, sentences: int, plus: tuple[str, float], minus: tuple[str, float], kind: str = "") -> Estimate:
        """``plus`` less ``minus``, each a method and a budget, over the pairs of a kind, or over all."""
        pairs = [pair for pair, its in self.kinds.items() if not kind or its == kind]
        found = []
        for pair in pairs:
            sides = [self.cells.get((pair, sentences, budget, method), ()) for method, budget in (plus, minus)]
            if min(map(len, sides)) < max(2, self.draws):
                raise _Missing
            found.append([a - b for a, b in zip(*sides, strict=True)])
        if not found:
            raise _Missing
        return pooled(found)


def _on_par(figures: _Figures, method: str) -> Estimate:
    most = figures.budgets[-1]
    return figures.difference(figures.sentences[-1], (method, most), ("full", most))


def _loss(figures: _Figures, method: str, kind: str = "") -> Estimate:
    least, most = figures.budgets[0], figures.budgets[-1]
    if least == most:
        raise _Missing
    return figures.difference(figures.sentences[-1], (method, most), (method, least), kind)


def _more_loss_far(figures: _Figures, method: str) -> Estimate:
    return _loss(figures, method, "far").minus(_loss(figures, method, "near"))


def _ahead(figures: _Figures, method: str) -> Estimate:
    if len(figures.sentences) < 2:
        raise _Missing
    most = figures.budgets[-1]
    return figures.difference(figures.sentences[0], (method, most), ("full", most))


#: A claim, the figure that answers it, and what the figure must be above.
CLAIMS: tuple[tuple[str, str, Callable[[_Figures, str], Estimate], float], ...] = (
    ("on par with full fine-tuning at the largest budget", "method - full, most data", _on_par, -PAR),
    ("loses quality below it", "largest - smallest budget, most data", _loss, 0.0),
    ("loses more for distant pairs", "that loss, far - near", _more_loss_far, 0.0),
    ("ahead of full fine-tuning with little data", "method - full, largest budget, least data", _ahead, 0.0),
)


def answered(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each claim and method: ``claim``, ``figure``, ``method``, ``answer``; ``mean`` and ``half`` if known.

    Args:
        comparisons: each with ``pair``, ``kind``, ``sentences``, ``budget`` and ``rows`` of ``method``, ``label`` and
            ``test``, chrF by draw.
    """
    figures, rows = _Figures(comparisons), []
    labels = {row["method"]: row["label"] for one in comparisons for row in one["rows"] if row["method"] != "full"}
    for claim, figure, estimate_of, threshold in CLAIMS:
        for method, label in labels.items():
            row: dict[str, Any] = {"claim": claim, "figure": figure, "method": label, "threshold": threshold}
            try:
                estimate = estimate_of(figures, method)
                row |= {"answer": estimate.above(threshold), "mean": estimate.mean, "half": estimate.half}
            except _Missing:
                row["answer"] = "not decided: runs are missing"
            rows.append(row)
    return rows
