"""Puts measured tables from bench/results/ into the README, between their markers.

    python -m bench.readme

A test fails when README and results part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench import demo_report, layer, minilm, peft_models

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def _where(machine: dict[str, Any]) -> str:
    return f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"


def _layer_section(document: dict[str, Any]) -> str:
    settings = f"r = {document['rank']}, s = {document['sparsity']}"
    return f"{layer.table(document['cases'])}\n\n`{document['command']}`, {settings}: {_where(document['machine'])}."


def _demo_section(document: dict[str, Any]) -> str:
    names = [field.name for field in fields(demo_report.Result)]
    results = [demo_report.Result(**{name: row[name] for name in names}) for row in document["methods"]]
    for result in results:  # JSON turns the rates, which are keys, into strings
        result.trials = {float(rate): accuracy for rate, accuracy in result.trials.items()}
    settings, before = document["settings"], document["target_accuracy_before_tuning"]
    return (
        f"{demo_report.table(results)}\n\n`{document['command']}`, {settings['labels_per_class']} labels a class, "
        f"mean and standard deviation of {len(settings['seeds'])} seeds; before tuning {before:.1f} %: "
        f"{_where(document['machine'])}."
    )


def _models_section(document: dict[str, Any]) -> str:
    settings = f"r = {document['rank']}, s = {document['sparsity']}"
    table = peft_models.table(document["models"])
    return f"{table}\n\n`{document['command']}`, {settings}: {_where(document['machine'])}."


def _minilm_section(document: dict[str, Any]) -> str:
    return f"{minilm.table(document['results'])}\n\n`{document['command']}`: {_where(document['machine'])}."


#: What renders a results file, by the file's name.
SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer-cpu": _layer_section,
    "layer-cuda": _layer_section,
    "demo": _demo_section,
    "peft-models-cpu": _models_section,
    "minilm": _minilm_section,
}


def rendered(readme: str) -> str:
    """The README with the tables that its markers ask for."""

    def section(match: re.Match[str]) -> str:
        document = json.loads((RESULTS / f"{match[2]}.json").read_text())
        return f"{match[1]}{SECTIONS[match[2]](document)}{match[3]}"

    return re.sub(r"(<!-- results: ([\w-]+) -->\n).*?(\n<!-- end -->)", section, readme, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
