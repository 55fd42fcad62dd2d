"""The rank of the merged update by kernel function: what the paper gives as the reason for merging nonlinearly.

    snell bench matrix-rank

Singular values, in float64, of updates merged from factors as they are drawn (256 x 256) and as training leaves them
(every linear layer of the demonstration's network, moved to its target domain), with and without competition.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from snell import SnellLinear, functional
from snell.bench import demo
from snell.bench.demo_data import load_domains
from snell.bench.demo_methods import Method, shown_layer
from snell.bench.demo_training import accuracy
from snell.bench.paper.shown import COLOURS, NAMES
from snell.bench.paper.sparsify import Contender
from snell.bench.record import made_by, markdown, out_option, write

#: The paper states no rank that it measured; this is its claim (section 3.2).
CLAIM = 'nonlinear kernel functions "obtain matrices with rank larger than r"'

#: What trains the demonstration's network well, by ``snell bench sparsify``; the last two have no row there.
RATES = {"linear": 1e-2, "piecewise_linear": 3e-2, "sigmoid": 3e-2, "rbf": 3e-2}


@dataclass(frozen=True)
class Settings:
    """``trained_rank`` is the factors' rank in the network; ``draws`` of factors are averaged over."""

    size: int = 256
    ranks: tuple[int, ...] = (8, 32)
    draws: int = 3
    trained_rank: int = 8
    steps: int = 120
    pretraining_steps: int = 700
    sparsity: float = 0.9


def spectrum(layer: SnellLinear) -> Tensor:
    """Singular values of the layer's dW, the largest first; merged in float64 from factors of any float dtype."""
    spec = layer.spec
    A, B, theta = (t.detach().double() for t in (layer.snell_A, layer.snell_B, layer.snell_theta))
    tau = functional.threshold(A, B, theta, spec)
    delta = functional.merge(A, B, theta, tau, kernel=spec.kernel, groups=spec.groups, gate=spec.effective_gate)
    return torch.linalg.svdvals(delta)


def measures(values: Tensor, longest: int) -> dict[str, float]:
    """Three ranks of a matrix whose longer side is ``longest``, from its singular values.

    ``rank`` and ``rank_float32`` count the values that rounding in either precision cannot explain: those over the
    largest times ``longest`` times eps. ``effective`` is the exponential of the entropy of the values' shares (Roy
    and Vetterli, 2007).
    """
    relative = values / values[0]
    shares = values[values > 0] / values.sum()
    return {
        "rank": int((relative > longest * torch.finfo(torch.float64).eps).sum()),
        "rank_float32": int((relative > longest * torch.finfo(torch.float32).eps).sum()),
        "effective": torch.exp(-(shares * shares.log()).sum()).item(),
    }


def _facts(contender: Contender) -> dict[str, Any]:
    return {"kernel": contender.matrix, "rank_r": contender.rank, "sparsity": contender.sparsity}


def _result(facts: dict[str, Any], found: list[dict[str, float]], shown: Tensor) -> dict[str, Any]:
    """A row: means of the measures, and the spectrum to be drawn, relative to its largest value."""
    means = {name: fmean(one[name] for one in found) for name in found[0]}
    return {**facts, **means, "spectrum": [float(f"{value:.3g}") for value in shown / shown[0]]}


def drawn(contender: Contender, settings: Settings) -> dict[str, Any]:
    """The ranks of updates whose factors were only drawn."""
    layer = torch.nn.Linear(settings.size, settings.size, bias=False, dtype=torch.float64)
    update = contender.layer(layer)
    found = []
    for _ in range(settings.draws):
        update.reset_update()
        values = spectrum(update)
        found.append(measures(values, settings.size))
    return _result({"factors": "drawn", "full": settings.size, **_facts(contender)}, found, values)


def trained(transfer: demo.Transfer, contender: Contender) -> dict[str, Any]:
    """The ranks of the updates of all layers of a tuned network."""
    method = Method(contender.matrix, contender.build, ())
    model = transfer.tuned(method, RATES[contender.matrix], seed=0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SnellLinear)}
    values = {name: spectrum(layer) for name, layer in layers.items()}
    found = [measures(values[name], max(layer.weight.shape)) for name, layer in layers.items()]
    facts = {"accuracy": accuracy(model, transfer.domains.target_validation)}
    full = fmean(min(layer.weight.shape) for layer in layers.values())
    shown = values[shown_layer(transfer.pretrained)]
    return _result({"factors": "trained", "full": full, **facts, **_facts(contender)}, found, shown)


def run(settings: Settings) -> list[dict[str, Any]]:
    """Every kernel function at every rank, with and without competition, drawn and trained."""
    torch.manual_seed(0)
    kernels = [(kernel, sparsity) for kernel in NAMES for sparsity in (0.0, settings.sparsity)]
    results = [drawn(Contender(k, rank, s), settings) for rank in settings.ranks for k, s in kernels]
    shared = demo.Settings(pretraining_steps=settings.pretraining_steps, steps=settings.steps)
    with tqdm(total=shared.pretraining_steps + settings.steps * len(kernels), unit="step", mininterval=1) as bar:
        transfer = demo.Transfer(load_domains(), shared, bar)
        return results + [trained(transfer, Contender(k, settings.trained_rank, s)) for k, s in kernels]


def table(results: list[dict[str, Any]]) -> str:
    """All ranks as a Markdown table; means over draws, or over layers."""
    columns = ["factors", "their rank r", "kernel function", "full rank", "rank of dW", "in float32", "effective"]
    columns += [f"{name}, competing" for name in columns[4:]]
    cases: dict[tuple[str, ...], list[str]] = {}
    for r in sorted(results, key=lambda r: r["sparsity"] > 0):
        case = (r["factors"], str(r["rank_r"]), NAMES[r["kernel"]], f"{r['full']:.4g}")
        cases.setdefault(case, []).extend(f"{r[name]:.1f}" for name in ("rank", "rank_float32", "effective"))
    return markdown(columns, ([*case, *found] for case, found in cases.items()))


def notes(results: list[dict[str, Any]]) -> str:
    """The paper's claim, and how well the networks did whose factors are called trained."""
    tuned = [r for r in results if "accuracy" in r]
    found = [f"{NAMES[r['kernel']]}{', competing' * (r['sparsity'] > 0)} {r['accuracy']:.0f} %" for r in tuned]
    lifted = [r for r in results if r["factors"] == "drawn" and r["kernel"] == "linear" and r["sparsity"]]
    ranks = ", ".join(f"{r['rank']:.0f} of {r['full']} from r = {r['rank_r']}" for r in lifted)
    return (
        f"The paper: {CLAIM}; it gives no figure. Competition alone lifts the linear merge too: to {ranks}. "
        f"Validation accuracies of the trained, of one draw of labels: {'; '.join(found)}."
    )


def picture(path: Path, results: list[dict[str, Any]], settings: Settings) -> None:
    """Singular values: left of drawn factors, right of trained ones; below with competition."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True, sharex="col")
    columns = {"drawn": settings.ranks[0], "trained": settings.trained_rank}
    for row, sparsity in zip(panels, (0.0, settings.sparsity), strict=True):
        for axes, (factors, rank) in zip(row, columns.items(), strict=True):
            for r in results:
                if (r["factors"], r["sparsity"], r["rank_r"]) == (factors, sparsity, rank):
                    values = torch.tensor(r["spectrum"])
                    axes.plot(range(1, len(values) + 1), values, color=COLOURS[r["kernel"]], label=NAMES[r["kernel"]])
            axes.axvline(rank, color="black", linestyle=":", linewidth=1)
            what = "no competition" if not sparsity else f"{1 - sparsity:.0%} of the entries survive"
            axes.set_title(f"{factors} factors of rank {rank} (dotted), {what}", loc="left", fontsize=11)
            axes.set_yscale("log")
            axes.set_ylim(1e-9, 2)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1]:
        axes.set_xlabel("index of the singular value")
    for axes in panels[:, 0]:
        axes.set_ylabel("singular value / the largest")
    panels[1, 0].legend(loc="lower left")
    figure.savefig(path, dpi=120)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{table(document['results'])}\n\n{notes(document['results'])}\n\n{made_by(document)}"


@click.command(help=__doc__)
@out_option
def main(out: Path) -> None:
    settings = Settings()
    results = run(settings)
    click.echo(f"{table(results)}\n\n{notes(results)}")
    write(out, "matrix-rank", {"settings": asdict(settings), "results": results})
    picture(out / "matrix-rank.png", results, settings)


if __name__ == "__main__":
    main()
