"""Puts measured tables from bench/results/ into the README, between their markers.

    python -m bench.readme

A test fails when README and results part.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench.layer import table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def layer_section(name: str) -> str:
    """The layer benchmark's table and what it was measured on."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    machine = document["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{table(document['cases'])}\n\n"
        f"`{document['command']}`, r = {document['rank']}, s = {document['sparsity']}: {where}, "
        f"torch {machine['torch']}."
    )


def rendered(readme: str) -> str:
    """The README with the tables that its markers ask for."""
    pattern = re.compile(r"(<!-- results: (layer-\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{layer_section(match[2])}{match[3]}", readme)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
