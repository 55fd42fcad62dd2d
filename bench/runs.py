"""Several runs of a benchmark, in processes of their own: medians, and how far the runs lie apart.

Within a process methods take turns, so that a ratio is steady. Between processes memory lies elsewhere and the machine
is in another mood: that spread is what a single run cannot show.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["combined", "spread", "together"]

#: Figures whose range over the runs is kept, as ``NAME_range``.
TIMES = ("seconds", "ratio_to_floor", "ratio_to_lora", "snell_over_it")


def together(runs: int, *arguments: str) -> dict[str, Any]:
    """The results of ``runs`` times ``snell ARGUMENTS --out FOLDER``, one after another, as :func:`combined` has them.

    Raises:
        RuntimeError: a run failed.
    """
    documents = []
    for run in range(runs):
        print(f"run {run + 1} of {runs}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "snell", *arguments, "--out", folder]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                raise RuntimeError(f"run {run + 1} failed with exit status {done.returncode}: {' '.join(command)}")
            (path,) = Path(folder).glob("*.json")
            documents.append(json.loads(path.read_text()))
    return combined(documents)


def combined(documents: Sequence[Any]) -> Any:
    """One document of several that differ in figures alone: medians, and the ranges of :data:`TIMES`.

    Raises:
        ValueError: they differ in more.
    """
    first = documents[0]
    if isinstance(first, dict):
        keys = [list(document) for document in documents]
        if any(other != keys[0] for other in keys):
            raise ValueError(f"runs must have the same figures; got {', '.join(map(str, keys))}")
        found = {key: combined([document[key] for document in documents]) for key in first}
        for key in set(TIMES) & first.keys():
            values = [document[key] for document in documents]
            found[f"{key}_range"] = [min(values), max(values)]
        return found
    if isinstance(first, list):
        return [combined(items) for items in zip(*documents, strict=True)]
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        middle = statistics.median_low if isinstance(first, int) else statistics.median
        return middle(documents)
    if any(document != first for document in documents):
        raise ValueError(f"runs must differ in figures alone; got {', '.join(map(str, documents))}")
    return first


def spread(entry: dict[str, Any], key: str) -> str:
    """The figure with two decimals, and its range where there were several runs."""
    text = f"{entry[key]:.2f}"
    if f"{key}_range" not in entry:
        return text
    low, high = entry[f"{key}_range"]
    return f"{text} ({low:.2f} to {high:.2f})"
