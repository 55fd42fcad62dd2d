"""Figure 4(a) of the paper: how closely two low-rank factors, merged by each kernel function, fit a random matrix.

    snell bench fit

As the paper's Appendix A.3 has it: Adam at a learning rate of 1e-4 takes 1e5 steps down the mean squared error
between a random matrix and kappa(B, A); the mean over ten matrices is reported. The paper's text calls the matrices
full-rank and its caption sparse: both are fitted here. Sparse ones are fitted by the competing update too, which
keeps as many entries as are not zero. The paper gives neither sizes nor ranks; these are in the settings.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from snell import functional
from snell.bench.paper.shown import COLOURS, NAMES
from snell.bench.record import made_by, markdown, out_option, write
from snell.spec import KERNEL_FUNCTIONS, Spec
from snell.update import draw

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
        return NAMES[self.kernel] + (", competing" if self.sparsity else "")


def variants(target: str, settings: Settings) -> list[Variant]:
    """What fits matrices of this kind."""
    competing = [Variant("piecewise_linear", 1 - settings.density)] if target == "sparse" else []
    return [*map(Variant, NAMES), *competing]


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


def fit(
    targets: Tensor, spec: Spec, settings: Settings, on_step: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Fit every target by factors of its own; Adam's step is taken for all of them at once, entry by entry.

    Args:
        targets: ``[N, m, n]`` float32.

    Returns:
        Mean squared errors of the N targets after each of :func:`recorded_steps`.
    """
    count, m, n = targets.shape
    theta = torch.empty(count, spec.num_theta)
    A, B, theta = parameters = [torch.empty(count, n, spec.rank), torch.empty(count, m, spec.rank), theta]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    each = [list(zip(*parameters, strict=True)), list(zip(*(p.grad for p in parameters), strict=True))]
    for factors in each[0]:
        draw(*factors, spec, settings.scale)
    trained = parameters if KERNEL_FUNCTIONS[spec.kernel].trains_theta else [A, B]
    optimizer = torch.optim.Adam(trained, lr=settings.learning_rate, fused=True)
    residuals, update = torch.empty_like(targets), (spec.kernel, spec.groups, spec.effective_gate)
    errors, recorded = [], set(recorded_steps(settings.steps))
    for step in range(settings.steps + 1):
        taus = [functional.threshold(*factors, spec) for factors in each[0]]
        for factors, tau, merged in zip(each[0], taus, residuals, strict=True):
            torch.ops.snell.merge_out(*factors, tau, None, merged, *update)
        residuals -= targets
        if step in recorded:
            errors.append(residuals.square().mean((1, 2)).tolist())
        residuals *= 2 / (m * n)
        for parameter in parameters:
            parameter.grad.zero_()
        for factors, tau, gradients, G in zip(each[0], taus, each[1], residuals, strict=True):
            torch.ops.snell.factor_grad(G, *factors, tau, None, None, *gradients, *update)
        optimizer.step()
        on_step()
    return errors


def run(settings: Settings) -> list[dict[str, Any]]:
    """Every kind of matrix at every rank by every kernel function."""
    torch.manual_seed(0)
    cases = [(k, rank, v) for k in TARGETS for rank in settings.ranks for v in variants(k, settings)]
    results = []
    with tqdm(total=len(cases) * (settings.steps + 1), unit="step", mininterval=1) as bar:
        for kind, rank, variant in cases:
            bar.set_description(f"{kind}, rank {rank}, {variant.label}")
            wanted = targets(kind, settings)
            errors = torch.tensor(fit(wanted, variant.spec(rank), settings, bar.update))
            size = wanted.square().mean((1, 2))
            left = errors / size
            curves = {"mean": left.mean(1), "least": left.amin(1), "most": left.amax(1)}
            results.append(
                {"target": kind, "rank": rank, **variant._asdict()}
                | {"mean_squares": size.tolist(), "best_linear": best_linear(wanted, rank)}
                | {"errors": errors[-1].tolist()}
                | {"left": {name: [float(f"{share:.4g}") for share in curve] for name, curve in curves.items()}}
            )
    return results


def _label(result: dict[str, Any]) -> str:
    return Variant(result["kernel"], result["sparsity"]).label


def _best_left(result: dict[str, Any]) -> float:
    """What the best matrix of the rank leaves over, as a share of the matrix's mean square."""
    pairs = zip(result["best_linear"], result["mean_squares"], strict=True)
    return statistics.fmean(best / size for best, size in pairs)


def table(results: list[dict[str, Any]]) -> str:
    """The last errors as a Markdown table."""
    linear = {(r["target"], r["rank"]): statistics.fmean(r["errors"]) for r in results if r["kernel"] == "linear"}
    columns = ("matrices", "rank", "kernel function", "mean squared error", "left of the matrix", "of linear's error")
    rows = []
    for r in results:
        case, mean = [r["target"], str(r["rank"])], statistics.fmean(r["errors"])
        errors = [f"{mean:.4f} ± {statistics.stdev(r['errors']):.4f}", f"{r['left']['mean'][-1]:.1%}"]
        rows.append([*case, _label(r), *errors, f"{mean / linear[r['target'], r['rank']]:.2f}"])
        if r["kernel"] == "linear":
            best = statistics.fmean(r["best_linear"])
            errors = [f"{best:.4f} ± {statistics.stdev(r['best_linear']):.4f}", f"{_best_left(r):.1%}"]
            rows.append([*case, "best matrix of this rank (SVD)", *errors, f"{best / mean:.2f}"])
    return markdown(columns, rows)


def verdict(results: list[dict[str, Any]]) -> str:
    """The paper's claim beside what was found, a sentence for each kind of matrix and rank."""
    found = []
    for kind, rank in dict.fromkeys((r["target"], r["rank"]) for r in results):
        case = [r for r in results if (r["target"], r["rank"]) == (kind, rank)]
        last = {_label(r): statistics.fmean(r["errors"]) for r in case}
        below = [name for name, error in last.items() if error < last[NAMES["linear"]]]
        found.append(f"{kind} at rank {rank}: below linear are {', '.join(below) or 'none'}")
    return f"The paper (Figure 4(a), a picture without numbers): {CLAIM}. Here, {'; '.join(found)}."


def picture(path: Path, results: list[dict[str, Any]], settings: Settings) -> None:
    """Error over steps: the mean over the matrices, and the band from the least to the most."""
    figure = Figure(figsize=(11, 4 * len(settings.ranks)), layout="constrained")
    panels = figure.subplots(len(settings.ranks), len(TARGETS), squeeze=False, sharex=True)
    steps = recorded_steps(settings.steps)
    for i, rank in enumerate(settings.ranks):
        for axes, kind in zip(panels[i], TARGETS, strict=True):
            shown = [r for r in results if (r["target"], r["rank"]) == (kind, rank)]
            for r in shown:
                curve = {name: 100 * torch.tensor(shares) for name, shares in r["left"].items()}
                style = {"color": COLOURS[r["kernel"]], "linestyle": "--" if r["sparsity"] else "-"}
                axes.plot(steps, curve["mean"], label=_label(r), **style)
                axes.fill_between(steps, curve["least"], curve["most"], color=style["color"], alpha=0.15, linewidth=0)
            best = 100 * _best_left(shown[0])
            axes.axhline(best, color="black", linestyle=":", linewidth=1, label="best matrix of this rank (SVD)")
            axes.set_title(f"{kind} matrices, {settings.size} x {settings.size}, by factors of rank {rank}", loc="left")
            axes.set_ylim(0, 105)
            axes.set_xscale("log")
            axes.set_xlim(steps[-1] ** 0.4, steps[-1])
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel(f"steps of Adam at {settings.learning_rate:g}")
    for axes in panels[:, 0]:
        axes.set_ylabel("mean squared error,\n% of the matrix's mean square")
    panels[0, -1].legend(fontsize=9, loc="lower left")
    figure.savefig(path, dpi=120)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{table(document['results'])}\n\n{verdict(document['results'])}\n\n{made_by(document)}"


@click.command(help=__doc__)
@click.option("--steps", type=int, default=Settings.steps, show_default=True, help="Steps of Adam.")
@click.option("--rank", "ranks", multiple=True, type=int, default=Settings.ranks, show_default=True, help="Ranks.")
@out_option
def main(steps: int, ranks: tuple[int, ...], out: Path) -> None:
    settings = Settings(steps=steps, ranks=ranks)
    results = run(settings)
    click.echo(f"{table(results)}\n\n{verdict(results)}")
    write(out, "fit", {"settings": asdict(settings), "results": results})
    picture(out / "fit.png", results, settings)


if __name__ == "__main__":
    main()
