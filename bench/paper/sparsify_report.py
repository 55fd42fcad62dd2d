"""What the sparsifying experiment shows: two tables with the paper's figures beside ours, and the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from snell.bench.names import KERNELS
from snell.bench.protocol import at_edge
from snell.bench.report import Document, Panel, Series, made_by, picture, plain_table, standard_error, with_error

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
    """Looks a row up by what is trained, its rank and whether it competes."""
    rows = {(r["matrix"], r["rank"], r["sparsity"] > 0, r["gate"]): r for r in results}

    def find(matrix: str, rank: int | None, competes: bool, gate: str = "hard") -> Row | None:
        return rows.get((matrix, rank, competes, gate))

    return find


def accuracy(row: Row | None) -> str:
    """A row's accuracy; a star where the learning rate lies at the edge of its grid."""
    return "-" if row is None else with_error(row["test"]) + ("*" if at_edge(row) else "")


def gain(without: Row | None, competing: Row | None) -> str:
    """What competition adds, draw of labels by draw of labels."""
    if without is None or competing is None:
        return "-"
    return with_error([a - b for a, b in zip(competing["test"], without["test"], strict=True)], "+")


def _cells(find: Find, matrix: str, rank: int | None, gate: str = "hard") -> list[str]:
    """Without competition, with it, and the gain."""
    pair = find(matrix, rank, False, gate), find(matrix, rank, True, gate)
    return [*map(accuracy, pair), gain(*pair)]


def _first_rank(results: Sequence[Row]) -> int:
    return next(r["rank"] for r in results if r["gate"] != "hard")


def tables(results: Sequence[Row]) -> str:
    """What is sparsified, then at what rank, as Markdown."""
    find, rank, rows = finder(results), _first_rank(results), []
    for matrix, gate in [*((m, "hard") for m in ROWS), ("piecewise_linear", "soft")]:
        of_rank = rank if matrix in KERNELS else None
        cells = _cells(find, matrix, of_rank, gate)
        if set(cells) != {"-"}:
            name = ROWS[matrix] + (f", r = {rank}" if of_rank else "")
            paper = PAPER_MERGES.get(matrix, ("-", "-")) if gate == "hard" else ("-", "-")
            rows.append([name + ("" if gate == "hard" else ", soft gate (Equation 5)"), *paper, *cells])
    columns = (
        "update",
        *(f"{whose}, {s}" for whose in ("the paper", "here") for s in ("no competition", "s = 0.9")),
        "gain",
    )
    merges, rows = plain_table(columns, rows), []
    for r in sorted({r["rank"] for r in results if r["rank"]}):
        paper, merges_at_r = PAPER_RANKS.get(r, ("-", "-")), ("piecewise_linear", "linear")
        rows.append([str(r), *paper, *(cell for matrix in merges_at_r for cell in _cells(find, matrix, r))])
    columns = "rank", "the paper: KLoRA", "SNELL", "here: KLoRA", "SNELL", "gain", "LoRA", "sparsified", "gain"
    probe = find("none", None, False)
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
    results = document["results"]
    find, rank, series = finder(results), _first_rank(results), []
    names = {"full-rank": "full rank", "straight-through": "full rank,\nlosers get\ngradients"}
    names |= {"linear": f"LoRA,\nr = {rank}", "piecewise_linear": f"kernelised\nLoRA, r = {rank}"}
    for x, matrix in enumerate(names):
        colour = KERNELS[matrix].colour if matrix in KERNELS else "#5f6b7a"
        for competes, shift, style in ((False, -0.2, {"alpha": 0.35}), (True, 0.2, {"alpha": 0.9})):
            if row := find(matrix, rank if matrix in KERNELS else None, competes):
                bar = {"error": [standard_error(row["test"])], "bars": 0.38, "style": style}
                series.append(Series([fmean(row["test"])], [x + shift], None, colour, **bar))
    probe, ticks = find("none", None, False), dict(enumerate(names.values()))
    title = "what is sparsified (pale: no competition; full: s = 0.9;\nline: a linear probe)"
    level = fmean(probe["test"]) if probe else None
    left = Panel(title, series, ylabel="test accuracy, %", ticks=ticks, level=level)
    series = []
    # Points of one rank stand a little apart, for their bars to be told from each other.
    for shift, matrix, name in ((0.98, "linear", "LoRA"), (1.02, "piecewise_linear", "kernelised LoRA")):
        for competes, look in ((False, "s--"), (True, "o-")):
            rows = [r for r in results if (r["matrix"], r["gate"], r["sparsity"] > 0) == (matrix, "hard", competes)]
            x = [r["rank"] * shift ** (2 * competes + 1) for r in rows]
            label = "s = 0.9" if competes else "no competition"
            means, errors = ([measure(r["test"]) for r in rows] for measure in (fmean, standard_error))
            series.append(Series(means, x, f"{name}, {label}", KERNELS[matrix].colour, look, errors))
    ticks = {r: str(r) for r in sorted({r["rank"] for r in results if r["rank"]})}
    right = Panel("at what rank", series, "rank r of the factors", log="x", ticks=ticks, legend={"fontsize": 8})
    picture(path, "A small ViT on digits (error bars: standard error over draws of labels)", [[left, right]], height=5)
