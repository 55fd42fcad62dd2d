"""Report what snell finds on this machine and whether it works here.

Shows the machine, the versions of what snell stands on, the native library, Triton, and which backend serves which
device and why. Then checks every operation of every backend that runs here against the float64 reference: each
kernel function, gate and dtype on small matrices of odd sizes. "Largest error" is a share of what the formulas'
rounding allows; above 1 is wrong.

Exit status: 0 if all is well, 1 if something that should work does not.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from math import isfinite
from typing import Any

import click

from snell import __version__
from snell.cli.environment import NOTE, OK, PROBLEM, Finding, findings
from snell.testing.selfcheck import Checked, check, places

_COLOURS = {OK: "green", NOTE: "yellow", PROBLEM: "red"}
_MARKS = {OK: "ok  ", NOTE: "note", PROBLEM: "FAIL"}


def _line(verdict: str, text: str, indent: str = "") -> None:
    mark = click.style(_MARKS[verdict], fg=_COLOURS[verdict])
    first, *rest = textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False) or [""]
    click.echo(f"  {mark}  {first}")
    for line in rest:
        click.echo(f"        {indent}{line}")


def _show(found: list[Finding]) -> None:
    section = ""
    for one in found:
        if one.section != section:
            section = one.section
            click.secho(f"\n{section}", bold=True)
        _line(one.verdict, f"{one.name:<13} {one.text}", " " * 14)
        if one.advice:
            click.echo(f"        {'':<13} -> {one.advice}")


def _show_check(one: Checked) -> None:
    worst = f"largest error {one.largest_error:.3f} of its bound ({one.worst})" if one.largest_error else "exact"
    _line(OK if one.ok else PROBLEM, f"{one.operation:<23} {one.cases:>2} cases  {worst if one.ok else one.verdict()}")


def _self_check(quiet: bool) -> list[Checked]:
    checks: list[Checked] = []
    if not quiet:
        click.secho("\nself-check against the float64 reference", bold=True)
    for backend, device, thinned in places():
        if not quiet:
            wait = "; the first time it compiles, which takes a minute" if device == "cuda" else ""
            click.echo(f"  backend {backend} on {device}{wait}")
        found = check(backend, device, thinned)
        checks += found
        if not quiet:
            for one in found:
                _show_check(one)
    return checks


def problems(found: list[Finding], checks: list[Checked]) -> list[str]:
    """A sentence for everything that should work and does not."""
    sentences = [f"{one.section}, {one.name}: {one.text}" for one in found if one.verdict == PROBLEM]
    wrong = [one for one in checks if not one.ok]
    return sentences + [f"backend {one.backend} on {one.device}, {one.operation}: {one.verdict()}" for one in wrong]


def _document(found: list[Finding], checks: list[Checked]) -> dict[str, Any]:
    faults = problems(found, checks)
    return {
        "snell": __version__,
        "ok": not faults,
        "problems": faults,
        "findings": [asdict(one) for one in found],
        # JSON has no infinity.
        "self_check": [
            asdict(one) | {"ok": one.ok, "largest_error": one.largest_error if isfinite(one.largest_error) else None}
            for one in checks
        ],
    }


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead, for scripts.")
@click.pass_context
def main(context: click.Context, as_json: bool) -> None:
    found = findings()
    if not as_json:
        click.secho(f"snell {__version__}", bold=True)
        _show(found)
    checks = _self_check(quiet=as_json)
    faults = problems(found, checks)
    if as_json:
        click.echo(json.dumps(_document(found, checks), indent=1))
    elif faults:
        click.secho(f"\n{len(faults)} problem{'s' if len(faults) > 1 else ''}:", fg="red", bold=True)
        for fault in faults:
            click.echo(textwrap.fill(f"- {fault}", 116, subsequent_indent="  ", break_long_words=False))
    else:
        notes = sum(one.verdict == NOTE for one in found)
        click.secho(f"\nEverything works{f' (notes above: {notes})' if notes else ''}.", fg="green", bold=True)
    context.exit(1 if faults else 0)
