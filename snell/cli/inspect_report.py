"""The table, notes, picture and JSON of ``snell inspect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from snell.cli import inspect_budget
from snell.cli.adapter import Adapter, read
from snell.cli.base_weights import BaseWeights
from snell.cli.inspect_picture import draw
from snell.cli.rows import Row, measure


def _ratio(row: Row) -> str:
    text = "-" if row.ratio is None else f"{100 * row.ratio:.3g} %"
    return f"{text} {'!' if row.exceeds_base else ' '}"


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
    "|dW|/|W0|  ": _ratio,
    "densest tenth: rows, columns": lambda r: (
        f"{100 * r.densest_tenth_of_rows:.0f} %, {100 * r.densest_tenth_of_columns:.0f} %"
    ),
}


def table(rows: Sequence[Any], columns: Mapping[str, Callable[[Any], str]]) -> str:
    """The figures in columns: names left-aligned, numbers right-aligned."""
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


def _total(rows: Sequence[Row]) -> str:
    total, entries = sum(row.survivors for row in rows), sum(row.out_features * row.in_features for row in rows)
    layers = f"{len(rows)} layer{'s' if len(rows) > 1 else ''}"
    return f"{total:,} of {entries:,} entries in {layers} survive ({100 * total / entries:.4g} %)"


def notes(rows: Sequence[Row], adapter: Adapter, base: str | None) -> list[str]:
    """Sentences on what a user may not expect."""
    found = []
    if excess := [row for row in rows if row.exceeds_base]:
        largest = max(excess, key=lambda row: row.ratio or float("inf"))
        found.append(
            f"note: |dW| > |W0| in {len(excess)} of {len(rows)} layers (marked !), most in {largest.name}: there the "
            "update outweighs the weight that it tunes. A smaller scale or learning rate keeps it smaller."
        )
    if adapter.config.init_weights == "identity" and any(row.sparsity_asked for row in rows):
        found.append(
            "note: the adapter subtracts the update it started with. Survivors are all entries that differ from the "
            "base's weight, up to twice as many as the sparsity alone leaves; |dW| is the norm of the difference."
        )
    missing = [row.name for row in rows if base is not None and row.base_norm is None]
    if missing:
        found.append(f"{base} holds no float weight for {len(missing)} of the layers, such as {missing[0]}.")
    if frozen := adapter.frozen():
        found.append(f"SafeCallback froze {len(frozen)} of {len(rows)} layers; inspect.json says which, and when.")
    if others := adapter.others():
        found.append(f"Other adapters are in {', '.join(map(str, others))}.")
    return found


def report(adapter_dir: Path, base: str | None, out: Path) -> None:
    """Print the table, and write the picture and the JSON into ``out``.

    Raises:
        click.ClickException: what is wrong with the adapter or the base, in a sentence.
    """
    adapter = read(adapter_dir)
    weights = BaseWeights(base) if base else None
    rows, grids = [], []
    with click.progressbar(adapter.updates(), len(adapter.keys), "measuring", file=sys.stderr) as updates:
        for name, update in updates:
            row, grid = measure(name, update, weights)
            rows.append(row)
            grids.append(grid)
    if weights is not None and all(row.base_norm is None for row in rows):
        raise click.ClickException(f"{base} holds no float weight for any layer of the adapter, such as {rows[0].name}")
    settings = _settings(adapter)
    made_of = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    click.echo(f"{adapter.folder}: {made_of}\n")
    columns = {name: cell for name, cell in _COLUMNS.items() if weights is not None or "W0" not in name}
    click.echo(table(rows, columns))
    click.echo(f"\n{_total(rows)}.")
    for note in notes(rows, adapter, base):
        click.echo(note)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "inspect.png", f"{adapter.folder}: {_total(rows)}\n{made_of}", rows, grids)
    written = [out / "inspect.png", out / "inspect.json"]
    moved = inspect_budget.history(adapter.folder)
    if moved := [(step, sparsities) for step, sparsities in moved if sparsities.keys() >= adapter.keys.keys()]:
        written.insert(1, out / "inspect-budget.png")
        inspect_budget.draw(written[1], f"{adapter.folder}: what each layer keeps", moved, list(adapter.keys))
    frozen = adapter.frozen()
    document = {
        "adapter": str(adapter_dir),
        "base": base,
        "settings": settings,
        "layers": [asdict(row) | {"frozen_at_step": frozen.get(row.name)} for row in rows],
        "sparsities": [{"step": step, "layers": sparsities} for step, sparsities in moved],
    }
    (out / "inspect.json").write_text(json.dumps(document, indent=1) + "\n")
    click.echo(f"written: {', '.join(map(str, written))}")
