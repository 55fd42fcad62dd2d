"""Grouped bars on a log axis, one colour a method, for the pictures of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from snell.bench.methods import METHODS


def grouped_bars(axes: Axes, groups: Sequence[str], heights: Mapping[str, Sequence[float | None]], label: str) -> None:
    """One group of bars a case and one bar a method; a method without a figure says so in its place.

    Args:
        groups: names of the cases.
        heights: of each method, by its name in METHODS, one a case; None where the method raised.
        label: of the vertical axis, with its unit.
    """
    width = 0.84 / len(heights)
    axes.set_yscale("log")
    # Bars of a log axis need a floor of their own, below the smallest.
    known = [height for values in heights.values() for height in values if height]
    axes.set_ylim(min(known) / 1.6, max(known) * 1.5)
    for index, (method, values) in enumerate(heights.items()):
        places = [group + (index - (len(heights) - 1) / 2) * width for group in range(len(groups))]
        shown = [height or 0 for height in values]
        axes.bar(places, shown, width, color=METHODS[method].colour, label=METHODS[method].label)
        for place, height in zip(places, values, strict=True):
            if not height:
                axes.text(place, min(known) / 1.4, "raises", rotation=90, fontsize=7, ha="center", va="bottom")
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylabel(label)
    # As many labels as there is room for.
    wide = max(known) > 100 * min(known)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 3) if wide else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(lambda height, _: f"{height:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
