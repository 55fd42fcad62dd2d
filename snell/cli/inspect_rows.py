"""What ``snell inspect`` prints and writes of a tuner whose figures are one row a layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from snell.cli.inspect_report import table

__all__ = ["show"]


def show(
    folder: Path, out: Path, heading: str, rows: Sequence[Any], columns: Mapping[str, Callable[[Any], str]]
) -> None:
    """Print the heading and the table, and write ``inspect.json`` into ``out``. Rows are dataclasses."""
    click.echo(f"{folder}: {heading} in {len(rows)} layer{'s' if len(rows) > 1 else ''}\n")
    click.echo(table(rows, columns))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "inspect.json"
    path.write_text(json.dumps({"adapter": str(folder), "layers": [asdict(row) for row in rows]}, indent=1) + "\n")
    click.echo(f"written: {path}")
