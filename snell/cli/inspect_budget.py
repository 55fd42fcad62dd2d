"""How a budget moved entries between the layers of an adapter, from the Trainer's checkpoint that holds it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: Sparsities by layer name after an allocation, with its step.
History = list[tuple[int, dict[str, float]]]

#: Layers that fit the axis by name.
NAMED = 60


def history(folder: Path) -> History:
    """What BudgetCallback saved beside the adapter; empty where it saved nothing, or nothing that can be read."""
    try:
        saved = torch.load(folder / "sparsity_budget_0.pt", map_location="cpu", weights_only=True)["history"]
        return [(step, {name.removeprefix("base_model.model."): s for name, s in of.items()}) for step, of in saved]
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, pickle.UnpicklingError):
        return []


def draw(path: Path, title: str, found: History, layers: Sequence[str]) -> None:
    """Write the picture: the share that each layer keeps, by step.

    Args:
        path: of the file.
        found: not empty; of these layers.
        layers: in the order of the table.
    """
    steps = [step for step, _ in found]
    kept = [[100 * (1 - sparsities[layer]) for _, sparsities in found] for layer in layers]
    figure = Figure(figsize=(13, 1.6 + 0.19 * min(len(layers), NAMED)), layout="constrained")
    axes = figure.subplots()
    # Each allocation holds until the next; the last one as long as the one before it.
    ends = [*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1]
    image = axes.pcolormesh(ends, range(len(layers) + 1), kept, cmap="BuPu", vmin=0, rasterized=True)
    axes.invert_yaxis()
    if len(layers) <= NAMED:
        axes.set_yticks([i + 0.5 for i in range(len(layers))], layers)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("step", fontsize=9)
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, label="entries that the layer keeps, %", aspect=30, pad=0.01)
    figure.savefig(path, dpi=130)
