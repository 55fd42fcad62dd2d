"""PEFT's own tests, with SNELL beside LoRA.

    python -m tests.peft_suite [--share 0/1] [--archive peft-0.21.2.tar.gz] [-k EXPRESSION]

Takes the test files from the source archive of the installed PEFT, runs every row of LoRA's that has a twin with both
tuners, on small checkpoints built here, and fails where SNELL fails a test that LoRA passes, unless differences.py
gives a reason. A whole run also fails where a reason is no longer needed.
"""

from __future__ import annotations

from pathlib import Path

import click

from .run import run


@click.command(help=__doc__)
@click.option("--share", default="0/1", show_default=True, help="i/n: every n-th test, from the i-th on.")
@click.option("--archive", type=click.Path(exists=True, path_type=Path), help="PEFT's source archive, if at hand.")
@click.option("-k", "chosen", default="", help="As pytest's -k.")
def main(share: str, archive: Path | None, chosen: str) -> None:
    first, shares = map(int, share.split("/"))
    found = run((first, shares), archive, chosen)
    click.echo(found)
    idle = found.idle if shares == 1 and not chosen else []
    for pattern in idle:
        click.echo(f"NOT NEEDED in differences.py: {pattern}")
    if found.unlisted or idle:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
