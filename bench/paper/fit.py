"""Figure 4(a) of the paper: how closely two low-rank factors, merged by each kernel function, fit a random matrix.

    snell bench fit

As the paper's Appendix A.3 has it: Adam at a learning rate of 1e-4 takes 1e5 steps down the mean squared error
between a random matrix and kappa(B, A); the mean over ten matrices is reported. The paper's text calls the matrices
full-rank and its caption sparse: both are fitted here. Sparse ones are fitted by the competing update too, which
keeps as many entries as are not zero. The paper gives neither sizes nor ranks; these are in the settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from snell.bench import core
from snell.bench.clock import Step
from snell.bench.core import Update
from snell.bench.names import KERNELS
from snell.bench.report import Columns, Document, Panel, Series, made_by, picture, table
from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.spec import Spec

TARGETS = ("full-rank", "sparse")
#: The figure itself is a picture without numbers; this is what the text says of it (section 4.3).
CLAIM = "nonlinear kernel functions fit more closely than the linear one"


@dataclass(frozen=True)
class Settings:
    """``scale`` is the kernel functions' at the start: 1, the size of a target's entries, which are standard normal."""

    size: int = 64
    ranks: tuple[int, ...] = (8,)
    matrices: int = 10
    density: float = 0.1
    steps: int = 100_000
    learning_rate: float = 1e-4
    scale: float = 1.0


class Variant(NamedTuple):
    """A kernel function, and the share of the entries that lose (by the hard gate: a survivor is K itself)."""

    kernel: str
    sparsity: float = 0.0

    def spec(self, rank: int) -> Spec:
        return Spec(rank, self.sparsity, self.kernel, 2 if KERNEL_FUNCTIONS[self.kernel].grouped else 1, "hard")

    @property
    def label(self) -> str:
        return KERNELS[self.kernel].label + (", competing" if self.sparsity else "")


def variants(target: str, settings: Settings) -> list[Variant]:
    """What fits matrices of this kind."""
    competing = [Variant("piecewise_linear", 1 - settings.density)] if target == "sparse" else []
    return [*map(Variant, KERNELS), *competing]


def targets(kind: str, settings: Settings) -> Tensor:
    """``[matrices, size, size]`` float32: standard normal, or that with all but a share of ``density`` set to zero."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.matrices, settings.size, settings.size)
    full = torch.randn(shape, generator=generator)
    return full if kind == "full-rank" else full * (torch.rand(shape, generator=generator) < settings.density)


def best_linear(targets: Tensor, rank: int) -> list[float]:
    """The least mean squared error of any matrix of this rank, of each target (Eckart and Young)."""
    values = torch.linalg.svdvals(targets.double())
    return (values[:, rank:].square().sum(1) / targets[0].numel()).tolist()


def recorded_steps(steps: int) -> list[int]:
    """Some sixty steps, evenly spread in their logarithm; the last is among them."""
    return sorted({round(steps ** (i / 60)) for i in range(61)})


def fit(targets: Tensor, spec: Spec, settings: Settings, tick: Step = lambda: None) -> list[list[float]]:
    """Fit every one of ``targets [N, m, n]`` by factors of its own; Adam steps for all at once, entry by entry.

    Returns their mean squared errors after each of :func:`recorded_steps`.
    """
    count, m, n = targets.shape
    sizes = (count, n, spec.rank), (count, m, spec.rank), (count, spec.num_theta)
    parameters = [torch.empty(size) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    updates = [Update(*factors, torch.zeros(()), spec) for factors in zip(*parameters, strict=True)]
    gradients = list(zip(*(parameter.grad for parameter in parameters), strict=True))
    for update in updates:
        core.draw(*update[:3], spec, settings.scale)
    trained = parameters if KERNEL_FUNCTIONS[spec.kernel].trains_theta else parameters[:2]
    optimizer = torch.optim.Adam(trained, lr=settings.learning_rate, fused=True)
    residuals, errors, recorded = torch.empty_like(targets), [], set(recorded_steps(settings.steps))
    for step in range(settings.steps + 1):
        updates = [update._replace(tau=core.select(update)) for update in updates]
        for update, merged in zip(updates, residuals, strict=True):
            core.backend(update).merge(update, None, merged)
        residuals -= targets
        if step in recorded:
            errors.append(residuals.square().mean((1, 2)).tolist())
        residuals *= 2 / (m * n)
        for parameter in parameters:
            parameter.grad.zero_()
        for update, grads, G in zip(updates, itertools.starmap(core.Gradients, gradients), residuals, strict=True):
            core.backend(update).factor_grad(G, update, grads)
        optimizer.step()
        tick()
    return errors


def measure(steps: int, rank: Sequence[int], settings: Settings | None = None) -> dict[str, Any]:
    """Every kind of matrix at every rank by every kernel function."""
    torch.manual_seed(0)
    settings = settings or Settings(steps=steps, ranks=tuple(rank))
    cases = [(k, r, v) for k in TARGETS for r in settings.ranks for v in variants(k, settings)]
    results = []
    with tqdm(total=len(cases) * (settings.steps + 1), unit="step", mininterval=1) as bar:
        for kind, r, variant in cases:
            bar.set_description(f"{kind}, rank {r}, {variant.label}")
            wanted = targets(kind, settings)
            errors = torch.tensor(fit(wanted, variant.spec(r), settings, bar.update))
            size = wanted.square().mean((1, 2))
            left = errors / size
            curves = {"mean": left.mean(1), "least": left.amin(1), "most": left.amax(1)}
            facts = {"target": kind, "rank": r, **variant._asdict(), "mean_squares": size.tolist()}
            facts |= {"best_linear": best_linear(wanted, r), "errors": errors[-1].tolist()}
            rounded = {name: [float(f"{share:.4g}") for share in curve] for name, curve in curves.items()}
            results.append(facts | {"left": rounded})
    return {"settings": asdict(settings), "results": results}


def _best_left(result: Mapping[str, Any]) -> float:
    """What the best matrix of the rank leaves over, as a share of the matrix's mean square."""
    pairs = zip(result["best_linear"], result["mean_squares"], strict=True)
    return fmean(best / size for best, size in pairs)


def _rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last errors, and beside the linear kernel function's those of the best matrix of its rank."""
    linear = {(r["target"], r["rank"]): fmean(r["errors"]) for r in results if r["kernel"] == "linear"}
    rows = []
    for r in results:
        case = {"target": r["target"], "rank": r["rank"], "linear": linear[r["target"], r["rank"]]}
        name = Variant(r["kernel"], r["sparsity"]).label
        rows.append({**case, "name": name, "errors": r["errors"], "left": r["left"]["mean"][-1]})
        if r["kernel"] == "linear":
            name = "best matrix of this rank (SVD)"
            rows.append({**case, "name": name, "errors": r["best_linear"], "left": _best_left(r)})
    return rows


COLUMNS: Columns = [
    ("matrices", "{target}"),
    ("rank", "{rank}"),
    ("kernel function", "{name}"),
    ("mean squared error", lambda row: f"{fmean(row['errors']):.4f} ± {stdev(row['errors']):.4f}"),
    ("left of the matrix", "{left:.1%}"),
    ("of linear's error", lambda row: f"{fmean(row['errors']) / row['linear']:.2f}"),
]


def report(document: Document) -> str:
    """The results file as Markdown, with the paper's claim beside what was found."""
    rows, found = _rows(document["results"]), []
    for kind, rank in dict.fromkeys((row["target"], row["rank"]) for row in rows):
        own = [row for row in rows if (row["target"], row["rank"]) == (kind, rank) and "SVD" not in row["name"]]
        below = [row["name"] for row in own if fmean(row["errors"]) < row["linear"]]
        found.append(f"{kind} at rank {rank}: below linear are {', '.join(below) or 'none'}")
    claim = f"The paper (Figure 4(a), a picture without numbers): {CLAIM}. Here, {'; '.join(found)}."
    return f"{table(COLUMNS, rows)}\n\n{claim}\n\n{made_by(document)}"


def draw(path: Path, document: Document) -> None:
    """Error over steps: the mean over the matrices, and the band from the least to the most."""
    settings = Settings(**document["settings"])
    steps = recorded_steps(settings.steps)
    late = [i for i, step in enumerate(steps) if step >= steps[-1] ** 0.4]
    x = [steps[i] for i in late]

    def panel(kind: str, rank: int) -> Panel:
        shown = [r for r in document["results"] if (r["target"], r["rank"]) == (kind, rank)]
        series = []
        for r in shown:
            mean, least, most = ([100 * r["left"][name][i] for i in late] for name in ("mean", "least", "most"))
            look, label = "--" if r["sparsity"] else "-", Variant(r["kernel"], r["sparsity"]).label
            series.append(Series(mean, x, label, KERNELS[r["kernel"]].colour, look, band=(least, most)))
        best = [100 * _best_left(shown[0])] * len(x)
        series.append(Series(best, x, "best matrix of this rank (SVD)", look=":", style={"linewidth": 1}))
        title = f"{kind} matrices, {settings.size} x {settings.size}, factors of rank {rank}"
        labels = f"steps of Adam at {settings.learning_rate:g}", "mean squared error,\n% of the matrix's mean square"
        return Panel(title, series, *labels, log="x", ylim=(0, 105), legend={"loc": "lower left"})

    rows = [[panel(kind, rank) for kind in TARGETS] for rank in settings.ranks]
    picture(path, "Fitting random matrices (bands: least to most of the matrices)", rows)
