"""The rank of the merged update by kernel function: what the paper gives as the reason for merging nonlinearly.

    snell bench matrix-rank

Singular values, in float64, of updates merged from factors as they are drawn (256 x 256) and as training leaves them
(every linear layer of the demonstration's network, moved to its target domain), with and without competition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from snell import SnellLinear, functional
from snell.bench import digits
from snell.bench.digits import Transfer, shown_layer
from snell.bench.names import KERNELS
from snell.bench.paper.sparsify import Contender
from snell.bench.report import Cell, Columns, Document, Panel, Series, fill, made_by, picture, table

#: The paper states no rank that it measured; this is its claim (section 3.2).
CLAIM = 'nonlinear kernel functions "obtain matrices with rank larger than r"'

#: What trains the demonstration's network well, by ``snell bench sparsify``; the last two have no row there.
RATES = {"linear": 1e-2, "piecewise_linear": 3e-2, "sigmoid": 3e-2, "rbf": 3e-2}


#: ``trained_rank`` is the factors' rank in the network; ``draws`` of factors are averaged over.
SETTINGS: dict[str, Any] = {"size": 256, "ranks": (8, 32), "draws": 3, "trained_rank": 8}
SETTINGS |= {"steps": 120, "pretraining_steps": 700, "sparsity": 0.9}


def spectrum(layer: SnellLinear) -> Tensor:
    """Singular values of the layer's dW, the largest first; merged in float64 from factors of any float dtype."""
    factors = [t.detach().double() for t in (layer.snell_A, layer.snell_B, layer.snell_theta)]
    settings = {"kernel": layer.spec.kernel, "groups": layer.spec.groups}
    tau = functional.select_threshold(*factors, sparsity=layer.spec.sparsity, **settings)
    return torch.linalg.svdvals(functional.merge(*factors, tau, gate=layer.spec.effective_gate, **settings))


def measures(values: Tensor, longest: int) -> dict[str, float]:
    """Three ranks of a matrix whose longer side is ``longest``, from its singular values.

    ``rank`` and ``rank_float32`` count the values that rounding in either precision cannot explain: those over the
    largest times ``longest`` times eps. ``effective`` is the exponential of the entropy of the values' shares (Roy
    and Vetterli, 2007).
    """
    relative, shares = values / values[0], values[values > 0] / values.sum()
    double, single = (int((relative > longest * torch.finfo(t).eps).sum()) for t in (torch.float64, torch.float32))
    return {"rank": double, "rank_float32": single, "effective": torch.exp(-(shares * shares.log()).sum()).item()}


def _row(one: Contender, found: Sequence[Mapping[str, float]], shown: Tensor, **facts: Any) -> dict[str, Any]:
    """Means of the measures, and the spectrum to be drawn, relative to its largest value."""
    facts |= {"kernel": one.matrix, "rank_r": one.rank, "sparsity": one.sparsity}
    means = {name: fmean(measured[name] for measured in found) for name in found[0]}
    return {**facts, **means, "spectrum": [float(f"{value:.3g}") for value in shown / shown[0]]}


def drawn(one: Contender, size: int, draws: int) -> dict[str, Any]:
    """The ranks of updates of ``size x size`` whose factors were only drawn."""
    layer, spectra = one.layer(nn.Linear(size, size, bias=False)), []
    for _ in range(draws):
        layer.reset_update()
        spectra.append(spectrum(layer))
    return _row(one, [measures(values, size) for values in spectra], spectra[-1], factors="drawn", full=size)


def trained(transfer: Transfer, one: Contender) -> dict[str, Any]:
    """The ranks of the updates of all layers of a tuned network."""
    model = transfer.tuned(one.build, RATES[one.matrix], seed=0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SnellLinear)}
    values = {name: spectrum(layer) for name, layer in layers.items()}
    found = [measures(values[name], max(layer.weight.shape)) for name, layer in layers.items()]
    full = fmean(min(layer.weight.shape) for layer in layers.values())
    shown, accuracy = values[shown_layer(transfer.pretrained)], transfer.accuracy(model, "validation")
    return _row(one, found, shown, factors="trained", full=full, accuracy=accuracy)


def measure() -> dict[str, Any]:
    """Every kernel function at every rank, with and without competition, drawn and trained."""
    torch.manual_seed(0)
    settings, steps = SETTINGS, SETTINGS["steps"]
    kernels = [(kernel, sparsity) for kernel in KERNELS for sparsity in (0.0, settings["sparsity"])]
    drawing = settings["size"], settings["draws"]
    results = [drawn(Contender(k, rank, s), *drawing) for rank in settings["ranks"] for k, s in kernels]
    shared = digits.Settings(settings["pretraining_steps"], steps=steps)
    with tqdm(total=shared.pretraining_steps + steps * len(kernels), unit="step", mininterval=1) as bar:
        transfer = Transfer(shared, bar)
        results += [trained(transfer, Contender(k, settings["trained_rank"], s)) for k, s in kernels]
    return {"settings": settings, "results": results}


def report(document: Document) -> str:
    """The results file as Markdown: all ranks, means over draws or over layers, and the paper's claim."""
    results = document["results"]
    competing = {(r["factors"], r["rank_r"], r["kernel"]): r for r in results if r["sparsity"]}

    def with_competition(cell: Cell) -> Cell:
        return lambda r: fill(cell, competing[r["factors"], r["rank_r"], r["kernel"]])

    ranks = {"rank of dW": "{rank:.1f}", "in float32": "{rank_float32:.1f}", "effective": "{effective:.1f}"}
    columns: Columns = [("factors", "{factors}"), ("their rank r", "{rank_r}")]
    columns += [("kernel function", lambda r: KERNELS[r["kernel"]].label), ("full rank", "{full:.4g}"), *ranks.items()]
    columns += [(f"{name}, competing", with_competition(cell)) for name, cell in ranks.items()]
    tuned = [r for r in results if "accuracy" in r]
    found = [f"{KERNELS[r['kernel']].label}{', competing' * (r['sparsity'] > 0)} {r['accuracy']:.0f} %" for r in tuned]
    lifted = [r for r in results if r["factors"] == "drawn" and r["kernel"] == "linear" and r["sparsity"]]
    lifts = ", ".join(f"{r['rank']:.0f} of {r['full']} from r = {r['rank_r']}" for r in lifted)
    return (
        f"{table(columns, (r for r in results if not r['sparsity']))}\n\nThe paper: {CLAIM}; it gives no figure. "
        f"Competition alone lifts the linear merge too: to {lifts}. Validation accuracies of the trained, of one draw "
        f"of labels: {'; '.join(found)}.\n\n{made_by(document)}"
    )


def draw(path: Path, document: Document) -> None:
    """Singular values: left of drawn factors, right of trained ones; below with competition."""

    def panel(factors: str, rank: int, sparsity: float) -> Panel:
        what, place = f"{1 - sparsity:.0%} of the entries survive" if sparsity else "no competition", (factors, rank)
        shown = [r for r in document["results"] if (r["factors"], r["rank_r"], r["sparsity"]) == (*place, sparsity)]
        series = [Series(r["spectrum"], range(1, len(r["spectrum"]) + 1), *KERNELS[r["kernel"]]) for r in shown]
        series.append(Series([1e-9, 2], [rank, rank], look=":", style={"linewidth": 1}))
        title, labels = f"{factors} factors of rank {rank} (dotted), {what}", ("index", "singular value / the largest")
        return Panel(title, series, *labels, log="y", ylim=(1e-9, 2))

    settings = document["settings"]
    columns = {"drawn": settings["ranks"][0], "trained": settings["trained_rank"]}
    rows = [[panel(*column, sparsity) for column in columns.items()] for sparsity in (0.0, settings["sparsity"])]
    picture(path, "Singular values of the update by kernel function", rows, height=3.8)
