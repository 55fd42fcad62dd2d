"""Table 5 of the paper on real data: which matrix is worth sparsifying, and what its rank does.

    snell bench sparsify

The demonstration's small vision transformer moves from upright digits to turned, inverted and noisy ones (see
``snell demo``). The update of every linear layer is a trainable full-rank matrix, LoRA's merge or the kernelised one,
each with a competition for one entry in ten and without, and both merges at several ranks. Each picks its learning
rate by the validation images over some draws of labels; other draws, the same for all, are judged on the test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click
from torch import nn
from tqdm import tqdm

from snell import SnellLinear
from snell.bench import demo
from snell.bench.demo_data import load_domains
from snell.bench.demo_methods import METHODS, Method, map_backbone
from snell.bench.demo_training import accuracy, num_trainable
from snell.bench.paper.dense import DenseUpdate
from snell.bench.paper.sparsify_report import draw, report, tables
from snell.bench.record import out_option, write
from snell.spec import KERNEL_FUNCTIONS

#: Learning rates to choose from: half decades around what a first look, with other draws, found best.
RATES = {
    "none": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "full-rank": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "straight-through": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "linear": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "piecewise_linear": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
#: Where losers never move, survivors have further to go; the kernelised merge has another scale where it competes.
COMPETING_RATES = {
    ("full-rank", "hard"): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("piecewise_linear", "hard"): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("piecewise_linear", "soft"): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
#: Scales of the kernelised merge where it competes: those at which LoRA's rates train it (``snell bench gates``).
COMPETING_SCALES = {"hard": 1.0, "soft": 3.0}


@dataclass(frozen=True)
class Settings:
    """``choosing`` and ``judging`` are how many draws of labels serve either."""

    steps: int = 120
    pretraining_steps: int = 700
    choosing: int = 4
    judging: int = 12
    ranks: tuple[int, ...] = (8, 16, 32)
    sparsity: float = 0.9


class Contender(NamedTuple):
    """``matrix``: a key of :data:`RATES`; a full-rank matrix has rank None."""

    matrix: str
    rank: int | None = None
    sparsity: float = 0.0
    gate: str = "hard"

    def layer(self, linear: nn.Linear) -> nn.Module:
        """``linear`` with this update."""
        if self.rank is None:
            return DenseUpdate(linear, sparsity=self.sparsity, straight_through=self.matrix == "straight-through")
        groups = 2 if KERNEL_FUNCTIONS[self.matrix].grouped else 1
        spec = {"rank": self.rank, "sparsity": self.sparsity, "kernel": self.matrix, "groups": groups}
        scale = COMPETING_SCALES[self.gate] if self.sparsity else None
        return SnellLinear.from_linear(linear, **spec, gate=self.gate, scale=scale)

    def build(self, pretrained: nn.Module) -> nn.Module:
        """The pre-trained network, frozen, with this update in every linear layer and a new head."""
        model = METHODS[0].build(pretrained)  # the linear probe
        return model if self.matrix == "none" else map_backbone(model, nn.Linear, self.layer)

    def method(self) -> Method:
        """The same as the demonstration takes it."""
        rates = RATES[self.matrix]
        if self.sparsity:
            rates = COMPETING_RATES.get((self.matrix, self.gate), rates)
        return Method(" ".join(str(part) for part in self if part is not None), self.build, rates)


def contenders(settings: Settings, rank: int = 8) -> list[Contender]:
    """Every row of both tables; ``rank`` is that of the first, where the paper's own gate runs too."""
    sparse = settings.sparsity
    dense = [Contender("none"), Contender("full-rank"), Contender("full-rank", None, sparse)]
    dense.append(Contender("straight-through", None, sparse))
    merges = ("linear", "piecewise_linear")
    ranked = [Contender(merge, r, s) for merge in merges for r in settings.ranks for s in (0.0, sparse)]
    return [*dense, *ranked, Contender("piecewise_linear", rank, sparse, "soft")]


def evaluate(transfer: demo.Transfer, contender: Contender, settings: Settings) -> dict[str, Any]:
    """One row: the learning rate that validation chose, and the test accuracies at it, in percent."""
    method, domains = contender.method(), transfer.domains
    judged = range(settings.judging)
    choosing = range(settings.judging, settings.judging + settings.choosing)

    def accuracies(rate: float, seeds: Sequence[int], images: Any) -> list[float]:
        return [accuracy(transfer.tuned(method, rate, seed), images) for seed in seeds]

    trials = {rate: fmean(accuracies(rate, choosing, domains.target_validation)) for rate in method.learning_rates}
    best = max(trials, key=trials.__getitem__)
    return {
        **contender._asdict(),
        "trainable": num_trainable(method.build(transfer.pretrained)),
        "trials": [{"rate": rate, "validation": found} for rate, found in trials.items()],
        "learning_rate": best,
        "accuracies": accuracies(best, judged, domains.target_test),
    }


def run(settings: Settings, chosen: Sequence[Contender] | None = None) -> list[dict[str, Any]]:
    """Every row, of one pre-trained network."""
    chosen = contenders(settings) if chosen is None else chosen
    tunings = sum(settings.choosing * len(c.method().learning_rates) + settings.judging for c in chosen)
    shared = demo.Settings(pretraining_steps=settings.pretraining_steps, steps=settings.steps)
    with tqdm(total=shared.pretraining_steps + settings.steps * tunings, unit="step", mininterval=1) as bar:
        transfer = demo.Transfer(load_domains(), shared, bar)
        return [evaluate(transfer, contender, settings) for contender in chosen]


@click.command(help=__doc__)
@out_option
def main(out: Path) -> None:
    settings = Settings()
    results = run(settings)
    write(out, "sparsify", {"settings": asdict(settings), "results": results})
    click.echo(tables(results))
    draw(out / "sparsify.png", results)


__all__ = ["Contender", "Settings", "contenders", "evaluate", "main", "report", "run"]


if __name__ == "__main__":
    main()
