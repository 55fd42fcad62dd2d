"""Show what a saved SNELL adapter does to each layer, without loading the model.

ADAPTER_DIR is a folder that save_pretrained or the Trainer wrote (adapter_config.json and
adapter_model.safetensors). For every layer: its shape, the rank, the share of zeros asked for and counted, the
threshold tau, and the Frobenius norm of dW; with --base also the norm of the base weight W0 and the ratio of the
two. "In a tenth of rows" is the share of survivors that the tenth of the rows with most of them hold: 10 % were even.

Writes inspect.png (where survivors lie in the matrices, and how they and dW spread over layers) and inspect.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from torch import Tensor

from snell.bench.record import out_option
from snell.cli.adapter import Adapter, read
from snell.cli.base_weights import BaseWeights
from snell.cli.inspect_picture import draw
from snell.cli.survivors import held_by_fullest_tenth, spread
from snell.update import Update


@dataclass(frozen=True)
class Row:
    """One layer's figures.

    Attributes:
        name: of the module in the base model.  out_features, in_features, rank: m, n and r.
        sparsity_asked, sparsity_counted: shares of dW's entries that are zero.
        survivors: how many are not.  tau: the threshold of \\|K\\|.
        norm, base_norm: Frobenius norms of dW and, where the base is at hand, W0.  ratio: of the two.
        in_a_tenth_of_rows, in_a_tenth_of_columns: the share of survivors in the fullest tenth.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    sparsity_asked: float
    sparsity_counted: float
    survivors: int
    tau: float
    norm: float
    base_norm: float | None
    ratio: float | None
    in_a_tenth_of_rows: float
    in_a_tenth_of_columns: float


def measure(name: str, update: Update, base: BaseWeights | None) -> tuple[Row, Tensor]:
    """One layer's figures, and the share of survivors over a coarse grid of its matrix."""
    m, n = update.B.shape[0], update.A.shape[0]
    base_norm = base.norm(name, m, n) if base is not None else None
    found = spread(update)
    row = Row(
        name=name,
        out_features=m,
        in_features=n,
        rank=update.spec.rank,
        sparsity_asked=update.spec.sparsity,
        sparsity_counted=1 - found.count / (m * n),
        survivors=found.count,
        tau=update.tau.item(),
        norm=found.norm,
        base_norm=base_norm,
        ratio=found.norm / base_norm if base_norm else None,
        in_a_tenth_of_rows=held_by_fullest_tenth(found.by_row),
        in_a_tenth_of_columns=held_by_fullest_tenth(found.by_column),
    )
    return row, found.grid


_COLUMNS = {
    "layer": lambda r: r.name,
    "out x in": lambda r: f"{r.out_features} x {r.in_features}",
    "rank": lambda r: str(r.rank),
    "zeros asked": lambda r: f"{100 * r.sparsity_asked:.3g} %",
    "counted": lambda r: f"{100 * r.sparsity_counted:.4f} %",
    "survivors": lambda r: f"{r.survivors:,}",
    "tau": lambda r: f"{r.tau:.3g}",
    "|dW|": lambda r: f"{r.norm:.3g}",
    "|W0|": lambda r: "-" if r.base_norm is None else f"{r.base_norm:.3g}",
    "|dW|/|W0|": lambda r: "-" if r.ratio is None else f"{r.ratio:.2e}",
    "in a tenth of rows, columns": lambda r: (
        f"{100 * r.in_a_tenth_of_rows:.0f} %, {100 * r.in_a_tenth_of_columns:.0f} %"
    ),
}


def table(rows: Sequence[Row], with_base: bool) -> str:
    """The figures in columns, names to the left and numbers to the right."""
    columns = {name: cell for name, cell in _COLUMNS.items() if with_base or "W0" not in name}
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *rest in lines:
        numbers = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        texts.append("  ".join([first.ljust(widths[0]), *numbers]))
    return "\n".join(texts)


def _settings(adapter: Adapter) -> dict[str, object]:
    config = adapter.config
    names = ("r", "sparsity", "kernel", "groups", "gate", "scale")
    return {name: getattr(config, name) for name in names} | {"base": config.base_model_name_or_path}


@click.command(help=__doc__)
@click.argument("adapter_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", metavar="NAME", help="Folder of the base model's checkpoint, or its name in the local cache.")
@out_option
def main(adapter_dir: Path, base: str | None, out: Path) -> None:
    adapter = read(adapter_dir)
    weights = BaseWeights(base) if base else None
    rows, grids = [], []
    with click.progressbar(adapter.updates(), len(adapter.keys), "measuring", file=sys.stderr) as updates:
        for name, update in updates:
            row, grid = measure(name, update, weights)
            rows.append(row)
            grids.append(grid)
    missing = [row.name for row in rows if weights is not None and row.base_norm is None]
    if len(missing) == len(rows):
        raise click.ClickException(f"{base} holds no float weight for any layer of the adapter, such as {missing[0]}")
    settings = _settings(adapter)
    click.echo(f"{adapter.folder}: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + "\n")
    click.echo(table(rows, weights is not None))
    total, entries = sum(row.survivors for row in rows), sum(row.out_features * row.in_features for row in rows)
    click.echo(f"\n{total:,} of {entries:,} entries in {len(rows)} layers survive ({100 * total / entries:.4g} %).")
    if missing:
        click.echo(f"{base} holds no float weight for {len(missing)} of the layers, such as {missing[0]}.")
    if others := adapter.others():
        click.echo(f"Further adapters lie in {', '.join(map(str, others))}.")
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "inspect.png", rows, grids)
    document = {
        "adapter": str(adapter_dir),
        "base": base,
        "settings": settings,
        "layers": [asdict(row) for row in rows],
    }
    (out / "inspect.json").write_text(json.dumps(document, indent=1) + "\n")
    click.echo(f"written: {out / 'inspect.png'}, {out / 'inspect.json'}")
