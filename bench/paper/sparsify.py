"""Table 5 of the paper on real data: which matrix is worth sparsifying, and what its rank does.

    snell bench sparsify

The demonstration's small vision transformer moves from upright digits to turned, inverted and noisy ones (see
``snell demo``). The update of every linear layer is a trainable full-rank matrix, LoRA's merge or the kernelised one,
each with a competition for one entry in ten and without, and both merges at several ranks. Each picks its learning
rate by the validation images over some draws of labels; other draws, the same for all, are judged on the test images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from snell import SnellLinear, reference
from snell.bench import digits
from snell.bench.contenders import replaced
from snell.bench.digits import Transfer, linear_probe
from snell.bench.memory import num_trained
from snell.bench.names import KERNELS
from snell.bench.protocol import at_edge, judged
from snell.bench.report import Document, Panel, Series, made_by, picture, plain_table, standard_error, with_error
from snell.kernel_functions import KERNEL_FUNCTIONS

#: ``choosing`` and ``judging`` are how many draws of labels serve either.
SETTINGS: dict[str, Any] = {"steps": 120, "pretraining_steps": 700, "choosing": 4, "judging": 12}
SETTINGS |= {"ranks": (8, 16, 32), "sparsity": 0.9}

#: The rank of the first table, where the paper's own gate runs too.
RANK = 8

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


class DenseUpdate(nn.Module):
    """A frozen linear layer plus a trainable matrix dW of its size, whose largest entries survive (the hard gate).

    Args:
        linear: the layer; its weight ``[m, n]`` and bias are shared and frozen.
        sparsity: share of dW's entries that are zero, in [0, 1).
        straight_through: whether losers get the gradient of their entry too, as if they had survived. Otherwise the
            gate counts as a constant, as in SNELL; but where factors are shared by a row, losers here never move.
    """

    #: Standard deviation of the matrix at the start. It cannot be 0: entries that tie with the threshold lose.
    START = 1e-3

    def __init__(self, linear: nn.Linear, *, sparsity: float, straight_through: bool = False) -> None:
        super().__init__()
        self.base, self.sparsity, self.straight_through = linear.requires_grad_(False), sparsity, straight_through
        self.update = nn.Parameter(self.START * torch.randn_like(linear.weight))

    def delta_weight(self) -> Tensor:
        """Dense dW ``[m, n]``, losers zero."""
        losers = math.ceil(self.sparsity * self.update.numel())
        if not losers:
            return self.update
        tau = self.update.detach().abs().flatten().kthvalue(losers).values
        survivors = self.update * reference.gate_values(self.update, tau, gate="hard")
        return self.update + (survivors - self.update).detach() if self.straight_through else survivors

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n] -> [..., m]``."""
        return nn.functional.linear(x, self.base.weight + self.delta_weight(), self.base.bias)


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
        model = linear_probe(pretrained)
        return model if self.matrix == "none" else replaced(model, self.layer)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from."""
        rates = RATES[self.matrix]
        return COMPETING_RATES.get((self.matrix, self.gate), rates) if self.sparsity else rates


def contenders(ranks: Sequence[int], sparsity: float) -> list[Contender]:
    """Every row of both tables."""
    dense = [Contender("none"), Contender("full-rank"), Contender("full-rank", None, sparsity)]
    dense.append(Contender("straight-through", None, sparsity))
    merges = ("linear", "piecewise_linear")
    ranked = [Contender(merge, rank, s) for merge in merges for rank in ranks for s in (0.0, sparsity)]
    return [*dense, *ranked, Contender("piecewise_linear", RANK, sparsity, "soft")]


def measure(chosen: Sequence[Contender] | None = None, **settings: Any) -> dict[str, Any]:
    """Every contender's row, of one pre-trained network; ``settings`` in place of :data:`SETTINGS`."""
    settings = SETTINGS | settings
    chosen = chosen or contenders(settings["ranks"], settings["sparsity"])
    steps, judging = settings["steps"], range(settings["judging"])
    choosing = range(settings["judging"], settings["judging"] + settings["choosing"])
    tunings = sum(len(choosing) * len(one.rates) + len(judging) for one in chosen)
    shared, rows = digits.Settings(settings["pretraining_steps"], steps=steps), []
    with tqdm(total=shared.pretraining_steps + steps * tunings, unit="step", mininterval=1) as bar:
        transfer = Transfer(shared, bar)
        for one in chosen:
            row = judged(partial(transfer.accuracies, one.build), one.rates, choosing, judging)
            rows.append(one._asdict() | {"trainable": num_trained(one.build(transfer.pretrained))} | row)
    return {"settings": settings, "results": rows}


#: VTAB-1k accuracies of ViT-B/16 in the paper (arXiv 2411.01800), means over the three groups of tasks: without
#: competition from its Table A11, with s = 0.9 from its Table 5(a).
PAPER_MERGES = {"full-rank": ("-", "74.4"), "linear": ("75.1", "65.7"), "piecewise_linear": ("75.6", "73.9")}
#: By rank, from its Table 5(b): kernelised LoRA without competition, and with (SNELL).
PAPER_RANKS = {8: ("73.2", "74.2"), 16: ("73.0", "74.4"), 32: ("72.7", "74.6")}

ROWS = {"full-rank": "full-rank matrix", "straight-through": "the same, losers get gradients too"}
ROWS |= {name: shown.label for name, shown in KERNELS.items()}

Row = Mapping[str, Any]
Find = Callable[..., "Row | None"]


def finder(results: Sequence[Row]) -> Find:
    """Looks a row up by what is trained, whether it competes, its rank (where it has one) and its gate."""
    rows = {(r["matrix"], r["sparsity"] > 0, r["rank"], r["gate"]): r for r in results}
    return lambda matrix, competes, rank=RANK, gate="hard": rows.get(
        (matrix, competes, rank if matrix in KERNELS else None, gate)
    )


def accuracy(row: Row | None) -> str:
    """A row's accuracy; a star where the learning rate lies at the edge of its grid."""
    return "-" if row is None else with_error(row["test"]) + ("*" if at_edge(row) else "")


def gain(without: Row | None, competing: Row | None) -> str:
    """What competition adds, draw of labels by draw of labels."""
    if without is None or competing is None:
        return "-"
    return with_error([a - b for a, b in zip(competing["test"], without["test"], strict=True)], "+")


def tables(results: Sequence[Row]) -> str:
    """What is sparsified, then at what rank, as Markdown."""
    find = finder(results)

    def cells(matrix: str, rank: int = RANK, gate: str = "hard") -> list[str]:
        pair = find(matrix, False, rank, gate), find(matrix, True, rank, gate)
        return [*map(accuracy, pair), gain(*pair)]

    rows = []
    for matrix, gate in [*((m, "hard") for m in ROWS), ("piecewise_linear", "soft")]:
        own = cells(matrix, gate=gate)
        if set(own) != {"-"}:
            name = ROWS[matrix] + (f", r = {RANK}" if matrix in KERNELS else "")
            paper = PAPER_MERGES.get(matrix, ("-", "-")) if gate == "hard" else ("-", "-")
            rows.append([name + ("" if gate == "hard" else ", soft gate (Equation 5)"), *paper, *own])
    settings = [f"{whose}, {s}" for whose in ("the paper", "here") for s in ("no competition", "s = 0.9")]
    merges, rows = plain_table(["update", *settings, "gain"], rows), []
    for r in sorted({r["rank"] for r in results if r["rank"]}):
        rows.append([str(r), *PAPER_RANKS.get(r, ("-", "-")), *cells("piecewise_linear", r), *cells("linear", r)])
    columns = "rank", "the paper: KLoRA", "SNELL", "here: KLoRA", "SNELL", "gain", "LoRA", "sparsified", "gain"
    probe = find("none", False)
    notes = "Accuracy in %, mean ± standard error over draws of labels; a gain is taken draw by draw. "
    notes += "The paper's figures are of ViT-B/16 on VTAB-1k: their order can be compared, not their size. "
    notes += "* the learning rate is the first or last of those tried. "
    notes += f"A linear probe reaches {accuracy(probe)}." if probe else ""
    return f"{merges}\n\n{plain_table(columns, rows)}\n\n{notes}"


def report(document: Document) -> str:
    """The results file as Markdown."""
    return f"{tables(document['results'])}\n\n{made_by(document)}"


def draw(path: Path, document: Document) -> None:
    """Accuracy by what is sparsified, each without (pale) and with competition; and over the rank."""
    results, bars, lines = document["results"], [], []
    find, probe = finder(results), finder(results)("none", False)
    names = {"full-rank": "full rank", "straight-through": "full rank,\nlosers get\ngradients"}
    names |= {"linear": f"LoRA,\nr = {RANK}", "piecewise_linear": f"kernelised\nLoRA, r = {RANK}"}
    for x, matrix in enumerate(names):
        colour = KERNELS[matrix].colour if matrix in KERNELS else "#5f6b7a"
        for competes, shift, alpha in ((False, -0.2, 0.35), (True, 0.2, 0.9)):
            if row := find(matrix, competes):
                style = {"error": [standard_error(row["test"])], "bars": 0.38, "style": {"alpha": alpha}}
                bars.append(Series([fmean(row["test"])], [x + shift], None, colour, **style))
    # Points of one rank stand a little apart, for their bars to be told from each other.
    for shift, matrix, name in ((0.98, "linear", "LoRA"), (1.02, "piecewise_linear", "kernelised LoRA")):
        for competes, look, label in ((False, "s--", "no competition"), (True, "o-", "s = 0.9")):
            rows = [r for r in results if (r["matrix"], r["gate"], r["sparsity"] > 0) == (matrix, "hard", competes)]
            x = [r["rank"] * shift ** (2 * competes + 1) for r in rows]
            means, errors = ([of(r["test"]) for r in rows] for of in (fmean, standard_error))
            lines.append(Series(means, x, f"{name}, {label}", KERNELS[matrix].colour, look, errors))
    title = "what is sparsified (pale: no competition; full: s = 0.9;\nline: a linear probe)"
    level, ranks = fmean(probe["test"]) if probe else None, sorted({r["rank"] for r in results if r["rank"]})
    left = Panel(title, bars, ylabel="test accuracy, %", ticks=dict(enumerate(names.values())), level=level)
    ticks, legend = {r: str(r) for r in ranks}, {"fontsize": 8}
    right = Panel("at what rank", lines, "rank r of the factors", log="x", ticks=ticks, legend=legend)
    picture(path, "A small ViT on digits (error bars: standard error over draws of labels)", [[left, right]], height=5)
