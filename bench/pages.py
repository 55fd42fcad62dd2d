"""Puts measured tables from bench/results/ into the README and docs/, between their markers.

    python -m snell.bench.pages

A page asks for ``bench/results/NAME.json`` by ``<!-- results: NAME -->`` ... ``<!-- end -->``, or for the short form of
it by ``<!-- results: NAME brief -->``. A test fails when pages and results part.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

#: The module whose ``report(document)`` (or ``brief(document)``) renders a results file, by the file's name.
REPORTS = {
    "layer-cpu": "layer",
    "layer-cuda": "layer",
    "demo": "demo",
    "models-cpu": "models",
    "models-cuda": "models",
    "steps-cpu": "paper.steps",
    "steps-cuda": "paper.steps",
    "memory-cpu": "paper.memory",
    "memory-cuda": "paper.memory",
    "minilm": "minilm",
    "soak": "soak",
    "growth-cpu": "growth",
    "growth-cuda": "growth",
    "gates": "paper.gates",
    "gates-minilm": "paper.gates",
    "operations-cpu": "operations",
    "resources": "resources",
    "fit": "paper.fit",
    "sparsify": "paper.sparsify",
    "matrix-rank": "paper.matrix_rank",
}


def pages() -> list[Path]:
    """Every page that may show results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str) -> str:
    """The page with the tables that its markers ask for."""

    def section(match: re.Match[str]) -> str:
        document = json.loads((RESULTS / f"{match[2]}.json").read_text())
        module = importlib.import_module(f"snell.bench.{REPORTS[match[2]]}")
        render = module.brief if match[3] else module.report
        return f"{match[1]}{render(document)}\n{match[4]}"

    marked = r"(<!-- results: ([\w-]+)( brief)? -->\n)(?:.*?\n)??(<!-- end -->)"
    return re.sub(marked, section, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in pages():
        page.write_text(rendered(page.read_text()))
