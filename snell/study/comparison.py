"""How methods are compared: validation draws choose each method's rate, other draws judge it beside LoRA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any, ClassVar

from torch import nn
from tqdm import tqdm

from snell.bench.report import standard_error
from snell.study.journal import Journal
from snell.study.methods import GRID, Method
from snell.study.tasks import Task
from snell.study.training import train_and_judge

#: Changes whenever a run of the same key would give another result.
VERSION = 1

#: Draws that choose rates; those that judge are numbered from ``FIRST_JUDGING``.
CHOOSING, FIRST_JUDGING = (0, 1, 2), 100
#: A rate that is so many points below the best of the first choosing draw is drawn no more.
MARGIN = 2.0
#: The least draws that judge a method, before a small error ends them.
FEWEST = 8
#: Examples that judge a run: each draw has its own.
SIZES = {"validation": 2000, "test": 3000}

BASELINE = Method("lora")


class OutOfTime(Exception):
    """The time for the study is over."""


@dataclass
class Comparison:
    """One task, its pre-trained backbone, and the journal of its runs.

    A ``setting`` is a dataclass of what a comparison keeps the same; it is part of every run's key.
    """

    sizes: ClassVar[Mapping[str, int]] = SIZES

    task: Task
    backbone: nn.Module
    journal: Journal
    bar: tqdm
    deadline: float | None = None  # in this process's processor time: no run starts after it
    finer: bool = False  # whether two rates between the best and its neighbours are tried as well
    error: float = 0.3  # in points: draws end when the difference from LoRA has a smaller standard error
    choosing: Sequence[int] = CHOOSING  # the draws that choose rates

    def run(self, setting: Any, method: Method, rate: float, draw: int, part: str) -> dict[str, Any]:
        """The result of a run, from the journal where it is there.

        Raises:
            OutOfTime: the run is not in the journal, and the study has used its time.
        """
        judge = f"{part}:{self.sizes[part]}"
        key = {"version": VERSION, **asdict(setting), "method": str(method), "rate": rate, "draw": draw, "judge": judge}
        result = self.journal.get(key)
        if result is None:
            if self.deadline is not None and time.process_time() > self.deadline:
                raise OutOfTime
            self.bar.set_postfix_str(f"{method}, {setting}, rate {rate:g}, draw {draw}")
            result = self.measure(setting, method, rate, draw, judge)
            self.journal.add(key, result)
        self.bar.update()
        return result

    def measure(self, setting: Any, method: Method, rate: float, draw: int, judge: str) -> dict[str, Any]:
        """Train and judge: ``accuracy`` (what rates are chosen by), ``trained``, ``seconds``."""
        return train_and_judge(self.task, self.backbone, setting, method, rate, draw, judge)

    def more(self, tests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a row holds beside the accuracies of its tests."""
        return {}

    def choose(self, setting: Any, method: Method) -> tuple[float, dict[float, list[float]]]:
        """The rate of the best mean validation accuracy, and the accuracies of all that were tried.

        Five rates are tried, and more until the best has a tried one on both sides; then, where ``finer`` says so, the
        two between.
        """
        found: dict[float, list[float]] = {}

        def best_of(rates: Sequence[float]) -> float:
            for rate in rates:
                found[rate] = [self.run(setting, method, rate, self.choosing[0], "validation")["accuracy"]]
            bar = max(first for first, *_ in found.values()) - MARGIN
            for rate, accuracies in found.items():
                if accuracies[0] >= bar:
                    accuracies += [
                        self.run(setting, method, rate, draw, "validation")["accuracy"]
                        for draw in self.choosing[len(accuracies) :]
                    ]
            whole = [rate for rate, tried in sorted(found.items()) if len(tried) == len(self.choosing)]
            return max(whole, key=lambda rate: fmean(found[rate]))

        untried: Sequence[float] = method.first_rates
        while untried:
            best = best_of(untried)
            position = GRID.index(best)
            neighbours = GRID[max(position - 1, 0) : position + 2]
            untried = [rate for rate in neighbours if rate not in found]
        if self.finer:
            best = best_of([float(f"{(best * rate) ** 0.5:.2g}") for rate in neighbours if rate != best])
        return best, dict(sorted(found.items()))

    def judge(
        self, setting: Any, method: Method, draws: int, baseline: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any] | None, bool]:
        """The method's row, and whether it is complete; None where there are too few runs for an error."""
        tests: list[dict[str, Any]] = []
        complete = False
        try:
            rate, tried = self.choose(setting, method)
            for number in range(draws):
                tests.append(self.run(setting, method, rate, FIRST_JUDGING + number, "test"))
                if baseline and number + 1 >= FEWEST:
                    pairs = zip(tests, baseline["test"], strict=False)
                    differences = [ours["accuracy"] - theirs for ours, theirs in pairs]
                    if standard_error(differences) < self.error:
                        break
            complete = True
        except OutOfTime:
            if len(tests) < 2:
                return None, False
        row = {
            "method": str(method),
            "label": method.label,
            "trained": tests[0]["trained"],
            "rate": rate,
            "rates": list(tried),
            "validation": list(tried.values()),
            "test": [test["accuracy"] for test in tests],
            "seconds": median(test["seconds"] for test in tests),
        }
        return row | self.more(tests) | _difference(row, baseline), complete

    def rows(self, setting: Any, methods: Sequence[Method], draws: int) -> tuple[list[dict[str, Any]], bool]:
        """A row for each method, and whether all are complete. LoRA, where it is among them, comes first."""
        baseline, rows, complete = None, [], True
        for method in sorted(methods, key=lambda method: method != BASELINE):
            row, whole = self.judge(setting, method, draws, baseline)
            complete &= whole
            if row is not None:
                rows.append(row)
                baseline = row if method == BASELINE else baseline
        return rows, complete


def _difference(row: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, list[float]]:
    """The difference from the baseline's accuracy, draw by draw, in points."""
    if baseline is None:
        return {}
    pairs = zip(row["test"], baseline["test"], strict=False)  # each stops adding draws by itself
    return {"difference": [ours - theirs for ours, theirs in pairs]}
