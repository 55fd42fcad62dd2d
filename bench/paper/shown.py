"""What the paper's experiments share in showing: kernel functions by name and colour, and Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"linear": "#e69f00", "piecewise_linear": "#0072b2", "sigmoid": "#009e73", "rbf": "#cc79a7"}
NAMES = {"linear": "linear (LoRA)", "piecewise_linear": "piecewise linear", "sigmoid": "sigmoid", "rbf": "RBF"}


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
