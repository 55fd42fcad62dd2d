"""The picture of ``snell inspect``: where survivors lie in some layers, and how all layers compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from snell.cli.rows import Row

#: Layers whose matrices are shown, and how many in a line.
MAPS, ACROSS = 8, 4

#: Layers that fit an axis by name, and blocks of layers that fit one by number.
NAMED, NUMBERED = 12, 24

BLUE, ORANGE, RED, GREY = "#2f6db3", "#e08a3c", "#c62f3b", "#6b7280"

#: What is drawn for a layer, by label: a colour and a figure, NaN where there is none.
Figures = dict[str, tuple[str, Callable[[Row], float]]]


def _block(name: str) -> tuple[str, str]:
    """A module's name up to its last number, and the rest: the block it lies in, and its name there."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 3)
    return ".".join(parts[: last + 1]), ".".join(parts[last + 1 :])


def _short(name: str) -> str:
    block, rest = _block(name)
    number = block.rpartition(".")[2]
    return f"{number}.{rest}" if number.isdigit() else rest


def _chosen(count: int) -> list[int]:
    """Up to :data:`MAPS` layers, evenly over all, the first and last among them."""
    if count <= MAPS:
        return list(range(count))
    return [round(i * (count - 1) / (MAPS - 1)) for i in range(MAPS)]


def _map(axes: Axes, row: Row, grid: Tensor, top: float):
    extent = (0, row.in_features, row.out_features, 0)
    image = axes.imshow(
        100 * grid.numpy(), cmap="BuPu", vmin=0, vmax=top, extent=extent, aspect="auto", interpolation="nearest"
    )
    axes.set_title(f"{_short(row.name)}, {row.out_features} x {row.in_features}", loc="left", fontsize=9)
    axes.set_xticks([0, row.in_features])
    axes.set_yticks([0, row.out_features])
    axes.tick_params(labelsize=8, colors=GREY, length=2)
    axes.spines[:].set_color("#c8ccd2")
    return image


def _maps(figure, rows: Sequence[Row], grids: Sequence[Tensor], chosen: Sequence[int]) -> None:
    axes = figure.subplots(-(-len(chosen) // ACROSS), ACROSS, squeeze=False).flatten()
    # One scale for all, so that maps compare. A few dense bins may lie above it.
    shares = sorted(share for i in chosen for share in grids[i].flatten().tolist())
    top = 100 * max(shares[int(0.995 * (len(shares) - 1))], 1e-9)
    for place, i in zip(axes, chosen, strict=False):
        image = _map(place, rows[i], grids[i], top)
    for place in axes[len(chosen) :]:
        place.axis("off")
    figure.supxlabel("column (input)", fontsize=9)
    figure.supylabel("row (output)", fontsize=9)
    extend = "max" if top < 100 else "neither"
    figure.colorbar(image, ax=list(axes), label="entries that survive, %", extend=extend, aspect=30, pad=0.01)


def _layers_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Layers by name where they are few, else by the number of their block, with every other block shaded."""
    axes.set_xlim(-0.7, len(rows) - 0.3)
    if len(rows) <= NAMED:
        axes.set_xticks(range(len(rows)), [_short(row.name) for row in rows], rotation=40, ha="right")
        return
    blocks = [(name, len(list(members))) for name, members in groupby(rows, lambda row: _block(row.name)[0])]
    every, start, ticks = -(-len(blocks) // NUMBERED), 0, {}
    for place, (name, size) in enumerate(blocks):
        if place % 2:
            axes.axvspan(start - 0.5, start + size - 0.5, color="#f1f3f5", zorder=0)
        number = name.rpartition(".")[2]
        if number.isdigit() and place % every == 0:
            ticks[start + (size - 1) / 2] = number
        start += size
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("layers in the table's order, by block" if ticks else "layers in the table's order", fontsize=9)


def _over_layers(axes: Axes, rows: Sequence[Row], title: str, figures: Figures, level: float, meaning: str) -> None:
    """A dot for each layer and figure, and a dotted line at ``level`` where it says something (NaN: nothing)."""
    _layers_axis(axes, rows)
    for place, (label, (colour, figure)) in enumerate(figures.items()):
        # A little apart, so that none hides another.
        places = [i + 0.2 * (place - (len(figures) - 1) / 2) for i in range(len(rows))]
        values = [figure(row) for row in rows]
        axes.plot(places, values, "o", color=colour, markersize=4.5, markeredgewidth=0, label=label, clip_on=False)
    if math.isfinite(level):
        axes.axhline(level, color=GREY, linestyle=":", linewidth=1.2)
        axes.annotate(
            meaning,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GREY,
        )
    axes.set_title(title, loc="left", fontsize=10, pad=20)
    axes.set_ylim(bottom=0, top=None if axes.get_ylim()[1] > 0 else 1)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    if len(figures) > 1:
        axes.legend(
            fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1), borderaxespad=0.2,
            handletextpad=0.1, columnspacing=1,
        )  # fmt: skip


def draw(path: Path, title: str, rows: Sequence[Row], grids: Sequence[Tensor]) -> None:
    """Write the picture.

    Args:
        path: of the file.
        title: two lines at most.
        rows, grids: each layer's figures, and its shares of survivors over a grid.
    """
    chosen = _chosen(len(rows))
    height = 2.5 * -(-len(chosen) // ACROSS) + 0.3
    figure = Figure(figsize=(13, height + 4.0), layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.012, ha="left", linespacing=1.5)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(height, 3.4), hspace=0.03)[:, 0]
    _maps(above, rows, grids, chosen)

    left, middle, right = below.subplots(1, 3)
    densest: Figures = {
        "rows": (BLUE, lambda r: 100 * r.densest_tenth_of_rows),
        "columns": (ORANGE, lambda r: 100 * r.densest_tenth_of_columns),
    }
    _over_layers(left, rows, "survivors in the densest tenth of the rows or columns, %", densest, 10, "uniform")
    untouched: Figures = {
        "rows": (BLUE, lambda r: 100 * r.untouched_rows),
        "columns": (ORANGE, lambda r: 100 * r.untouched_columns),
    }
    _over_layers(middle, rows, "rows and columns without a survivor, %", untouched, math.nan, "")
    norms, level, title = (lambda r: r.norm), math.nan, "Frobenius norm of dW"
    if any(row.base_norm is not None for row in rows):
        norms, title = (lambda r: math.nan if r.ratio is None else 100 * r.ratio), "Frobenius norm of dW, % of W0's"
    figures: Figures = {"": (BLUE, norms)}
    if any(row.exceeds_base for row in rows):
        level, figures = (
            100,
            {
                "at most W0's": (BLUE, lambda r: math.nan if r.exceeds_base else norms(r)),
                "larger": (RED, lambda r: norms(r) if r.exceeds_base else math.nan),
            },
        )
    _over_layers(right, rows, title, figures, level, "W0's norm")
    figure.savefig(path, dpi=130)
