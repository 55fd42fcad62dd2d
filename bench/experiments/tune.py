"""Times candidate tiles of every kernel on this GPU and prints a row for each for ``snell.kernels.table``.

snell bench tune [--rank 8 --rank 32] [--shape IN OUT]

A candidate's time is the sum over the cases; one that does not compile for this GPU is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import click
import torch
from tqdm import tqdm

from snell.bench import core
from snell.bench.clock import Step, median_seconds
from snell.bench.experiments.gpu import SHAPES
from snell.bench.report import Document
from snell.kernels import launch
from snell.kernels.table import TABLE, Row

#: Rows and columns of a tile; one that leaves between 8 and 32 entries a thread is tried with 4 and 8 warps.
TILES = {
    "select": ((2, 4, 8, 16), (256, 512)),
    "merge": ((32, 64, 128), (64, 128)),
    "factor_grad": ((32, 64, 128), (32, 64, 128)),
    "few_tokens": ((64, 128), (32, 64, 128)),
}

#: Columns of a block of G.
COLUMNS = 512


def candidates(operation: str) -> list[Row]:
    rows = itertools.starmap(Row, itertools.product(*TILES[operation], (4, 8)))
    return [row for row in rows if 8 <= row.block_m * row.block_n // (32 * row.num_warps) <= 32]


def fastest(operation: str, calls: list[Step]) -> tuple[Row, float]:
    """The fastest candidate, and its time as a share of that of the row in the table."""
    here = launch.row(operation, torch.empty(0, device="cuda"))
    seconds: dict[Row, float] = {}
    for row in tqdm(dict.fromkeys([here, *candidates(operation)]), desc=operation):
        with mock.patch.dict(TABLE, {arch: {**rows, operation: row} for arch, rows in TABLE.items()}):
            try:
                seconds[row] = sum(median_seconds([call], "cuda", repetitions=7) for call in calls)
            except Exception as error:  # the compiler's and the driver's have no common class
                tqdm.write(f"{operation} {row}: {type(error).__name__}: {str(error).splitlines()[0]}")
    best = min(seconds, key=seconds.__getitem__)
    return best, seconds[best] / seconds[here]


def measure(rank: Sequence[int], shape: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The fastest row of every operation, and its time as a share of the present row's."""
    if not torch.cuda.is_available():
        raise click.UsageError("there is no GPU here that torch can use")
    updates = [core.new_update(m, n, r, "cuda") for n, m in (list(shape) or SHAPES)[:3] for r in rank]
    found = {}
    for operation in TILES:
        calls = [core.kernel_calls(update, torch.bfloat16, COLUMNS)[operation] for update in updates]
        found[operation] = fastest(operation, calls)
    major, minor = torch.cuda.get_device_capability()
    return {"architecture": major * 10 + minor, "gpu": torch.cuda.get_device_name(), "rows": found}


def report(document: Document) -> str:
    """The rows as they stand in the table."""
    lines = [
        f'    "{operation}": Row{tuple(row)},  # {share:.2f} of the present row\'s time'
        for operation, (row, share) in document["rows"].items()
    ]
    return "\n".join([f"{document['architecture']}: {{  # {document['gpu']}", *lines, "}"])
