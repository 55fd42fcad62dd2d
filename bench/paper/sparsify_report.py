"""What the sparsifying experiment shows: two tables with the paper's figures beside ours, and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snell.bench.paper.shown import COLOURS, NAMES
from snell.bench.record import made_by, markdown

#: VTAB-1k accuracies of ViT-B/16 in the paper (arXiv 2411.01800), means over the three groups of tasks: without
#: competition from its Table A11, with s = 0.9 from its Table 5(a).
PAPER_MERGES = {"full-rank": ("-", "74.4"), "linear": ("75.1", "65.7"), "piecewise_linear": ("75.6", "73.9")}
#: By rank, from its Table 5(b): kernelised LoRA without competition, and with (SNELL).
PAPER_RANKS = {8: ("73.2", "74.2"), 16: ("73.0", "74.4"), 32: ("72.7", "74.6")}

ROWS = {"full-rank": "full-rank matrix", "straight-through": "the same, losers get gradients too"} | NAMES
GATES = {"hard": "", "soft": ", soft gate (Equation 5)"}

Results = list[dict[str, Any]]
Find = Callable[..., dict[str, Any] | None]


def finder(results: Results) -> Find:
    """Looks a row up by what is trained, its rank and whether it competes."""
    rows = {(r["matrix"], r["rank"], r["sparsity"] > 0, r["gate"]): r for r in results}

    def find(matrix: str, rank: int | None, competes: bool, gate: str = "hard") -> dict[str, Any] | None:
        return rows.get((matrix, rank, competes, gate))

    return find


def spread(values: list[float]) -> str:
    """Mean and its standard error."""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def cell(result: dict[str, Any] | None) -> str:
    """A row's accuracy; a star where the learning rate lies at the edge of its grid."""
    if result is None:
        return "-"
    rates = [trial["rate"] for trial in result["trials"]]
    return spread(result["accuracies"]) + ("*" if result["learning_rate"] in (rates[0], rates[-1]) else "")


def gain(without: dict[str, Any] | None, competing: dict[str, Any] | None) -> str:
    """What competition adds, draw of labels by draw of labels."""
    if without is None or competing is None:
        return "-"
    pairs = zip(competing["accuracies"], without["accuracies"], strict=True)
    found = spread([a - b for a, b in pairs])
    return found if found.startswith("-") else f"+{found}"


def tables(results: Results) -> str:
    """What is sparsified, then at what rank, as Markdown."""
    find = finder(results)
    (rank,) = {r["rank"] for r in results if r["gate"] != "hard"}
    columns = ("update", "the paper, no competition", "the paper, s = 0.9", "here, no competition", "here, s = 0.9")
    rows = []
    for matrix, gate in [(m, "hard") for m in ROWS] + [("piecewise_linear", "soft")]:
        its_rank = rank if matrix in NAMES else None
        pair = find(matrix, its_rank, False, gate), find(matrix, its_rank, True, gate)
        if any(pair):
            name = ROWS[matrix] + (f", r = {rank}" if its_rank else "") + GATES[gate]
            paper = PAPER_MERGES.get(matrix, ("-", "-")) if gate == "hard" else ("-", "-")
            rows.append([name, *paper, *map(cell, pair), gain(*pair)])
    merges = markdown((*columns, "gain"), rows)

    columns = ("rank", "the paper: KLoRA", "SNELL", "here: KLoRA", "SNELL", "gain", "LoRA", "sparsified", "gain")
    rows = []
    for r in sorted({r["rank"] for r in results if r["rank"]}):
        row = [str(r), *PAPER_RANKS.get(r, ("-", "-"))]
        for matrix in ("piecewise_linear", "linear"):
            pair = find(matrix, r, False), find(matrix, r, True)
            row += [*map(cell, pair), gain(*pair)]
        rows.append(row)
    probe = find("none", None, False)
    notes = "Accuracy in %, mean ± standard error over draws of labels; a gain is taken draw by draw. "
    notes += "The paper's figures are of ViT-B/16 on VTAB-1k: their order can be compared, not their size. "
    notes += "* the learning rate is the first or last of those tried. "
    notes += f"A linear probe reaches {cell(probe)}." if probe else ""
    return f"{merges}\n\n{markdown(columns, rows)}\n\n{notes}"


def _errorbar(axes: Axes, x: list[float], rows: Results, **style: Any) -> None:
    means = [statistics.fmean(r["accuracies"]) for r in rows]
    errors = [statistics.stdev(r["accuracies"]) / math.sqrt(len(r["accuracies"])) for r in rows]
    axes.errorbar(x, means, errors, capsize=3, **style)


def _bars(axes: Axes, results: Results) -> None:
    """Each matrix without (pale) and with competition."""
    find = finder(results)
    (rank,) = {r["rank"] for r in results if r["gate"] != "hard"}
    names = {"full-rank": "full rank", "straight-through": "full rank,\nlosers get\ngradients"}
    names |= {"linear": f"LoRA,\nr = {rank}", "piecewise_linear": f"kernelised\nLoRA, r = {rank}"}
    colours = COLOURS | {"full-rank": "#5f6b7a", "straight-through": "#5f6b7a"}
    for x, matrix in enumerate(names):
        for competes in (False, True):
            row = find(matrix, rank if matrix in NAMES else None, competes)
            if row is not None:
                at, alpha, ink = (x + 0.2, 0.9, "white") if competes else (x - 0.2, 0.35, "black")
                axes.bar(at, statistics.fmean(row["accuracies"]), 0.38, color=colours[matrix], alpha=alpha)
                _errorbar(axes, [at], [row], color="black", linewidth=1)
                axes.text(at, 2, f"s = {row['sparsity']:g}", ha="center", fontsize=8, color=ink)
    probe = find("none", None, False)
    if probe:
        axes.axhline(statistics.fmean(probe["accuracies"]), color="black", linestyle=":", linewidth=1)
        axes.text(0.42, statistics.fmean(probe["accuracies"]) + 0.7, "linear probe", fontsize=8)
    axes.set_xticks(range(len(names)), list(names.values()), fontsize=9)
    axes.set_ylabel("test accuracy, %")
    axes.set_title("what is sparsified", loc="left")


def draw(path: Path, results: Results) -> None:
    """Accuracy by what is sparsified, and over the rank; bars are standard errors over draws of labels."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, results)
    # Points of one rank stand a little apart, for their bars to be told from each other.
    for shift, matrix, name in ((0.98, "linear", "LoRA"), (1.02, "piecewise_linear", "kernelised LoRA")):
        for competes in (False, True):
            same = (r for r in results if (r["matrix"], r["gate"], r["sparsity"] > 0) == (matrix, "hard", competes))
            rows = sorted(same, key=lambda r: r["rank"])
            line = {"linestyle": "-", "marker": "o"} if competes else {"linestyle": "--", "marker": "s"}
            style = {"color": COLOURS[matrix], "markersize": 5, **line}
            label = f"{name}, " + ("s = 0.9" if competes else "no competition")
            _errorbar(right, [r["rank"] * shift ** (2 * competes + 1) for r in rows], rows, label=label, **style)
    ranks = sorted({r["rank"] for r in results if r["rank"]})
    right.set_xscale("log", base=2)
    right.set_xticks(ranks, [str(r) for r in ranks])
    right.set_xlabel("rank r of the factors")
    right.set_ylabel("test accuracy, %")
    right.set_title("at what rank", loc="left")
    right.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{tables(document['results'])}\n\n{made_by(document)}"
