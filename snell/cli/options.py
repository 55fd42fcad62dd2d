"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

#: ``--out FOLDER``: where results go.
out_option = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="out", show_default=True, help="Results folder."
)
