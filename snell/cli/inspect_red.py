"""The table and JSON of ``snell inspect`` for a RED adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import click
from torch import Tensor

from snell.cli.adapter import natural, weights
from snell.cli.inspect_rows import show

_VECTOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.repr_(?P<name>scaling|bias)\.weight$")


@dataclass(frozen=True)
class Row:
    """One layer's figures.

    Attributes:
        name: of the module in the base model.
        out_features: how many outputs are edited.
        scaling_mean, scaling_smallest, scaling_largest: of the vector s.
        negative: share of s below 0.
        scaling_distance, bias_size: root mean squares of s - 1 and of c.
    """

    name: str
    out_features: int
    scaling_mean: float
    scaling_smallest: float
    scaling_largest: float
    negative: float
    scaling_distance: float
    bias_size: float


_COLUMNS = {
    "layer": lambda r: r.name,
    "outputs": lambda r: str(r.out_features),
    "s: mean": lambda r: f"{r.scaling_mean:.4g}",
    "smallest": lambda r: f"{r.scaling_smallest:.4g}",
    "largest": lambda r: f"{r.scaling_largest:.4g}",
    "below 0": lambda r: f"{100 * r.negative:.3g} %",
    "s - 1": lambda r: f"{r.scaling_distance:.3g}",
    "c": lambda r: f"{r.bias_size:.3g}",
}


def measure(name: str, scaling: Tensor, bias: Tensor) -> Row:
    """The figures of one layer's vectors ``[m]``."""
    s, c = scaling.double(), bias.double()
    smallest, largest = s.aminmax()
    return Row(
        name,
        len(s),
        s.mean().item(),
        smallest.item(),
        largest.item(),
        (s < 0).double().mean().item(),
        (s - 1).square().mean().sqrt().item(),
        c.square().mean().sqrt().item(),
    )


def _rows(folder: Path) -> list[Row]:
    found: dict[str, dict[str, Tensor]] = {}
    with weights(folder) as file:
        for key in file.keys():  # noqa: SIM118
            if match := _VECTOR.match(key):
                found.setdefault(match["layer"], {})[match["name"]] = file.get_tensor(key)
    if not found:
        raise click.ClickException(f"{folder} holds no tensor of a RED adapter")
    for layer, vectors in found.items():
        for name in ("scaling", "bias"):
            if name not in vectors:
                raise click.ClickException(f"{folder} lacks repr_{name} of {layer}: the adapter is incomplete")
            if not vectors[name].isfinite().all():
                raise click.ClickException(f"repr_{name} of {layer} holds NaN or infinite values")
        if vectors["scaling"].dim() != 1 or vectors["scaling"].shape != vectors["bias"].shape:
            shapes = ", ".join(f"repr_{name} {list(vector.shape)}" for name, vector in vectors.items())
            raise click.ClickException(f"{layer} holds {shapes}: both must be one vector of the layer's outputs")
    return [measure(layer, **found[layer]) for layer in sorted(found, key=natural)]


def report(folder: Path, out: Path) -> None:
    """Print the table, and write the JSON into ``out``.

    Raises:
        click.ClickException: what is wrong with the adapter, in a sentence.
    """
    rows = _rows(folder)
    numbers = sum(2 * row.out_features for row in rows)
    show(folder, out, f"RED, {numbers:,} numbers", rows, _COLUMNS)
