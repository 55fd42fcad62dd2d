"""The picture of ``snell inspect``: where survivors lie in some layers, and how they and dW spread over all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    from snell.cli.inspect import Row

#: Layers whose matrices are shown, and layers that still fit an axis by name.
MAPS, NAMED = 8, 16

ROWS, COLUMNS = "#1f77b4", "#e08e45"


def _short(name: str) -> str:
    """The last parts of a module's name, from its last number on."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] :] if numbers else parts[-2:])


def _chosen(count: int) -> list[int]:
    """Up to :data:`MAPS` layers, evenly over all, the first and last among them."""
    if count <= MAPS:
        return list(range(count))
    return [round(i * (count - 1) / (MAPS - 1)) for i in range(MAPS)]


def _map(axes: Axes, row: Row, grid: Tensor, top: float):
    extent = (0, row.in_features, row.out_features, 0)
    image = axes.imshow(
        100 * grid.numpy(), cmap="magma", vmin=0, vmax=top, extent=extent, aspect="auto", interpolation="nearest"
    )
    axes.set_title(f"{_short(row.name)}\n{row.survivors:,} of {row.out_features} x {row.in_features}", fontsize=9)
    axes.set_xticks([0, row.in_features])
    axes.set_yticks([0, row.out_features])
    axes.tick_params(labelsize=8)
    return image


def _over_layers(axes: Axes, rows: Sequence[Row], title: str, figures: dict[str, tuple[str, Callable]]) -> None:
    places = range(len(rows))
    for label, (colour, figure) in figures.items():
        axes.plot(places, [figure(row) for row in rows], "o", color=colour, markersize=4, label=label)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(rows) <= NAMED:
        axes.set_xticks(list(places), [_short(row.name) for row in rows], rotation=60, ha="right")
    else:
        axes.set_xlabel("layer, in the table's order", fontsize=9)
    if len(figures) > 1:
        axes.legend(fontsize=8, frameon=False)


def draw(path: Path, rows: Sequence[Row], grids: Sequence[Tensor]) -> None:
    """Write the picture of layers given by their figures and their grids of survivors' shares."""
    chosen = _chosen(len(rows))
    across = min(4, len(chosen))
    down = -(-len(chosen) // across)
    figure = Figure(figsize=(13, 3.9 + 2.6 * down), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.6 * down, 3.9))[:, 0]
    axes = above.subplots(down, across, squeeze=False).flatten()
    # One scale for all, so that maps compare; the densest bins of a few rows may lie above it.
    shares = sorted(share for i in chosen for share in grids[i].flatten().tolist())
    top = 100 * max(shares[int(0.995 * (len(shares) - 1))], 1e-9)
    for place, i in zip(axes, chosen, strict=False):
        image = _map(place, rows[i], grids[i], top)
    for place in axes[len(chosen) :]:
        place.axis("off")
    above.supxlabel("column (input)", fontsize=9)
    above.supylabel("row (output)", fontsize=9)
    above.colorbar(
        image, ax=list(axes), label="entries that survive, %", extend="max" if top < 100 else "neither", shrink=0.9
    )

    total = sum(row.survivors for row in rows) or 1
    left, middle, right = below.subplots(1, 3)
    _over_layers(left, rows, "share of all survivors, %", {"": (ROWS, lambda r: 100 * r.survivors / total)})
    tenths = {
        "rows": (ROWS, lambda r: 100 * r.in_a_tenth_of_rows),
        "columns": (COLUMNS, lambda r: 100 * r.in_a_tenth_of_columns),
    }
    _over_layers(middle, rows, "survivors in the fullest tenth, %", tenths)
    middle.axhline(10, color="black", linestyle=":", linewidth=1)
    middle.annotate("even", (0, 10), xytext=(0, 2), textcoords="offset points", fontsize=8)
    if all(row.ratio is None for row in rows):
        _over_layers(right, rows, "Frobenius norm of dW", {"": (ROWS, lambda r: r.norm)})
    else:
        ratio = {"": (ROWS, lambda r: float("nan") if r.ratio is None else 100 * r.ratio)}
        _over_layers(right, rows, "norm of dW, % of W0's", ratio)
    figure.savefig(path, dpi=130)
