"""Puts measured tables from bench/results/ into the README and docs/, between their markers.

    python -m snell.bench.pages [--pictures]

A page asks for ``bench/results/NAME.json`` by ``<!-- results: NAME -->`` ... ``<!-- end -->``, or for the short form of
it by ``<!-- results: NAME brief -->``. A test fails when pages and results part. ``--pictures`` draws ``NAME.png`` anew
for every results file whose picture needs nothing else.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from snell.cli import BENCHMARKS, COMMANDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

#: What the name of a results file may end in: where it was measured, or on which data.
ENDINGS = "-(cpu|cuda|epyc|(wordnet|debian|fashion)(-[a-z-]+)?)$"


def pages() -> list[Path]:
    """Every page that may show results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def module_of(name: str) -> Any:
    """The module whose ``report``, ``brief`` and ``draw`` show a results file."""
    commands = {key: module for rows in (COMMANDS | BENCHMARKS).values() for key, (module, _) in rows.items()}
    commands |= {name: f"snell.study.{name}" for name in ("classify", "curve", "dynamics", "translate")}
    return importlib.import_module(commands.get(re.sub(ENDINGS, "", name), "snell.bench.report"))


def rendered(text: str) -> str:
    """The page with the tables that its markers ask for."""

    def section(match: re.Match[str]) -> str:
        document, module = json.loads((RESULTS / f"{match[2]}.json").read_text()), module_of(match[2])
        render = module.brief if match[3] else module.report
        return f"{match[1]}{render(document)}\n{match[4]}"

    marked = r"(<!-- results: ([\w-]+)( brief)? -->\n)(?:.*?\n)??(<!-- end -->)"
    return re.sub(marked, section, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in pages():
        page.write_text(rendered(page.read_text()))
    for path in sorted(RESULTS.glob("*.json")) if "--pictures" in sys.argv else ():
        if hasattr(module_of(path.stem), "draw"):
            module_of(path.stem).draw(path.with_suffix(".png"), json.loads(path.read_text()))
