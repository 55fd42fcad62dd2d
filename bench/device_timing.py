"""Times of single operations on a GPU beside what the same machine copies and multiplies.

Inputs rotate among sets that together exceed the cache, so that none is found there by accident; figures
are medians over repetitions, taken by events.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from snell.bench.measure import seconds_of
from snell.bench.record import out_option, write

#: Together the input sets are this much larger than the L2 cache.
OVER_CACHE = 3

#: in_features, out_features: attention and MLP of a 7B model, MLP of a 70B model, output layer.
SHAPES = ((4096, 4096), (4096, 11008), (8192, 28672), (4096, 128256))


def cache_bytes(device: str) -> int:
    """The L2 cache; on a CPU, where only the code is tried, none."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0


def num_sets(bytes_each: int, device: str) -> int:
    """How many sets of inputs of that size exceed the cache."""
    return max(2, -(-OVER_CACHE * cache_bytes(device) // bytes_each))


def median_seconds(steps: Sequence[Callable[[], object]], device: str, repetitions: int = 21) -> float:
    """The median time of one step, the steps taking turns; each runs once before."""
    for step in steps:
        step()
    return statistics.median(seconds_of(steps[i % len(steps)], device) for i in range(repetitions))


def ceilings(device: str) -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and FLOP/s of a large bf16 product, in this run."""
    size = 2**30 if device == "cuda" else 2**20
    source, target = (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )
    copy = median_seconds([lambda: target.copy_(source)], device)
    n = 8192 if device == "cuda" else 128
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"copy_bytes_per_s": 2 * size / copy, "gemm_flop_per_s": 2 * n**3 / median_seconds([lambda: a @ b], device)}


def update(m: int, n: int, rank: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Factors and theta as a SNELL layer starts with."""
    A = (torch.rand(n, rank, device=device) * 2 - 1) / (n * rank / 2) ** 0.5
    B = (torch.rand(m, rank, device=device) * 2 - 1) / (m * rank / 2) ** 0.5
    return A, B, torch.tensor([0.1, -0.1], device=device)


@dataclass(frozen=True)
class Run:
    """What the command line of an operation's benchmark says."""

    device: str
    ranks: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    out: Path


def operation_command(main: Callable[[Run], None]) -> click.Command:
    """``main`` as a command with the options of :class:`Run`, described by its module's docstring."""

    def command(device: str, rank: tuple[int, ...], shape: tuple[tuple[int, int], ...], out: Path) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise click.BadParameter("there is no GPU here that torch can use", param_hint="--device")
        main(Run(device, rank, shape or SHAPES, out))

    options = (
        click.option(
            "--device",
            type=click.Choice(["cuda", "cpu"]),
            default="cuda",
            show_default=True,
            help="cpu tries the code, and times nothing.",
        ),
        click.option("--rank", type=int, multiple=True, default=(8, 32), show_default=True, help="May be repeated."),
        click.option(
            "--shape",
            type=(int, int),
            multiple=True,
            metavar="IN OUT",
            help="May be repeated; some models' unless given.",
        ),
        out_option,
    )
    for option in reversed(options):
        command = option(command)
    return click.command(help=sys.modules[main.__module__].__doc__)(command)


def report(name: str, run: Run, limits: dict[str, float], rows: list[dict[str, Any]], file: str | None = None) -> None:
    """Print the rows as a table, and write them with the machine's facts to ``file`` or ``name``.json."""
    copy, product = limits["copy_bytes_per_s"] / 1e12, limits["gemm_flop_per_s"] / 1e12
    click.echo(f"{name}: copy {copy:.2f} TB/s, bf16 GEMM {product:.0f} TFLOP/s")
    columns = list(rows[0])
    click.echo("  ".join(f"{column:>18}" for column in columns))
    for row in rows:
        cells = (f"{value:>18.4g}" if isinstance(value, float) else f"{value!s:>18}" for value in row.values())
        click.echo("  ".join(cells))
    write(run.out, file or name, {**limits, "rows": rows}, benchmark=name, device=run.device)
