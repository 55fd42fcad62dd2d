"""What the demonstration shows: the table, the results file and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from snell.bench.demo_data import CLASSES, Domains, Images

__all__ = ["Result", "draw", "table"]

COLOURS = {"linear probe": "#9aa0a6", "full fine-tuning": "#5f6b7a", "LoRA (PEFT)": "#e08e45", "SNELL": "#1f77b4"}


@dataclass
class Result:
    """One method's row. ``trials``: validation accuracy of each learning rate; accuracies are percentages."""

    method: str
    trials: dict[float, float]
    learning_rate: float
    accuracies: list[float]
    trainable: int = 0
    saved_bytes: int = 0
    step_seconds: float = 0.0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| method | target accuracy, % | trainable parameters | saved for backward | time per step | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        edge = r.learning_rate in (min(r.trials), max(r.trials))
        lines.append(
            f"| {r.method} | {r.mean:.1f} ± {r.spread:.1f} | {r.trainable:,} | {r.saved_bytes / 2**20:.2f} MiB "
            f"| {r.step_seconds * 1e3:.1f} ms | {r.learning_rate:g}{' (edge of its grid)' if edge else ''} |"
        )
    return "\n".join(lines)


def _sheet(axes: Axes, images: Images, rows: int, title: str) -> None:
    """One column a digit, ``rows`` examples of each."""
    chosen = [torch.nonzero(images.labels == digit).flatten()[:rows] for digit in range(CLASSES)]
    tiles = torch.stack([images.pixels[index, 0] for index in chosen])  # [digit, row, 8, 8]
    padded = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=float("nan"))
    axes.imshow(padded.permute(1, 2, 0, 3).reshape(rows * 10, CLASSES * 10).numpy(), cmap="gray", vmin=-1.3, vmax=1.3)
    axes.set_title(title, loc="left", fontsize=11)
    axes.axis("off")


def _accuracies(axes: Axes, results: Sequence[Result], untuned: float) -> None:
    for y, r in enumerate(reversed(results)):
        colour = COLOURS.get(r.method, "black")
        axes.barh(y, r.mean, color=colour, alpha=0.35, height=0.62)
        axes.plot(r.accuracies, [y] * len(r.accuracies), "o", color=colour, markersize=6, alpha=0.9)
        axes.text(max(r.accuracies) + 2, y, f"{r.mean:.1f} ± {r.spread:.1f}", va="center", fontsize=10)
    axes.axvline(untuned, color="black", linestyle=":", linewidth=1)
    axes.text(untuned + 0.8, len(results) - 1.5, "before tuning", fontsize=9, va="center")
    axes.set_yticks(range(len(results)), [r.method for r in reversed(results)])
    axes.set_xlim(0, 100)
    axes.set_title("accuracy on the target's test images, % (dots: seeds)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _update_map(axes: Axes, delta: Tensor, name: str) -> None:
    """Entries of dW by sign and size; entries that are exactly zero stay white."""
    limit = delta.abs().max().item() or 1.0
    shown = torch.where(delta == 0, torch.nan, delta.sign() * (delta.abs() / limit).sqrt())
    axes.imshow(shown.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(f"{name}\n{int(delta.count_nonzero()):,} of {delta.numel():,}", loc="left", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def draw(
    path: Path, domains: Domains, results: Sequence[Result], untuned: float, updates: dict[str, Tensor], layer: str
) -> None:
    """Both domains, what each method reached, and which entries of one layer's weight it changed."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    left, right = top.subplots(1, 2)
    _sheet(left, domains.source_test, 4, "source: handwritten digits, upright")
    _sheet(right, domains.target_test, 4, "target: turned by a quarter, inverted, noisy")
    chart, maps = bottom.subfigures(1, 2, width_ratios=(1.2, 1))
    _accuracies(chart.subplots(), results, untuned)
    maps.suptitle(f"entries of {layer} that tuning changed: red up, blue down", fontsize=11, x=0.02, ha="left")
    # The probe changes no weight of the backbone.
    updates = {name: delta for name, delta in updates.items() if delta.any()}
    for axes, (name, delta) in zip(maps.subplots(1, len(updates), squeeze=False)[0], updates.items(), strict=True):
        _update_map(axes, delta, name)
    figure.savefig(path, dpi=130)
