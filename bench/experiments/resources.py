"""Registers, shared memory, stack and local bytes of every GPU kernel, compiled ahead of time: no GPU is needed.

The host functions run as they are, on CPU tensors; only the launch is replaced, by a compilation for the
specialisation that launch would have got: what is read off the machine code is what a GPU would run.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import triton
import triton.backends.nvidia
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from snell import waves
from snell.bench import core
from snell.bench.core import Update
from snell.bench.report import Cell, Columns, Document, table
from snell.kernels import launch, rectangles
from snell.kernels.table import TABLE, Row
from snell.spec import Spec

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


class _Target:
    """In place of Triton's driver: a GPU that kernels are compiled for and cannot run on."""

    def __init__(self, arch: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        # A kernel remembers what it compiled by the device: one for each architecture.
        self.get_current_device, self.get_current_stream = lambda: arch, lambda _: 0


def resources(compiled: Any) -> dict[str, int]:
    """Registers, shared memory, stack and local bytes of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    if usage.keys() != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump told no resources: {dump!r}")
    # Triton's tiles are dynamic shared memory, which the machine code does not tell of.
    shared = {"shared": usage["SHARED"] + compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    return {"registers": usage["REG"], "stack": usage["STACK"], "local": usage["LOCAL"], **shared}


#: Multiprocessors of an A100, an H100 and a B200: plans of launches go by them.
PROCESSORS = {80: 108, 90: 132, 100: 148}


def launches(call: Callable[[], object], arch: int, seen: set[str]) -> Iterator[dict[str, Any]]:
    """The resources of every kernel that ``call`` would launch on ``arch``, but for those in ``seen``."""
    found: list[dict[str, Any]] = []

    def run(kernel: Any, grid: Any, args: tuple, row: Row | None = None, **meta: Any) -> None:
        options = {"num_warps": row.num_warps} if row else {}
        compiled = kernel.warmup(*args, grid=(1,), **meta, **options, enable_fp_fusion=False)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            settings = " ".join(str(meta[k]) for k in ("KERNEL", "RANK", "GROUPS") if k in meta)
            settings += " start" if any(isinstance(arg, tuple) for arg in args) else ""
            dtypes = {str(t.dtype).removeprefix("torch.") for t in args if isinstance(t, torch.Tensor)}
            facts = {"kernel": kernel.__name__, "arch": arch, "settings": settings, "dtypes": " ".join(sorted(dtypes))}
            found.append(facts | resources(compiled))

    driver.set_active(_Target(arch))
    here = mock.patch.multiple(launch, run=run, row=lambda name, _: TABLE[arch][name])
    with here, mock.patch.object(waves, "num_processors", return_value=PROCESSORS[arch]):
        call()
    yield from found


def update_of(kernel: str, rank: int, groups: int, m: int = 128, n: int = 256) -> Update:
    """An update whose values do not matter, as nothing is launched."""
    spec = Spec(rank, 0.9, kernel, groups)
    theta = torch.full((spec.num_theta,), 0.1)
    maxima = None if spec.function.softmax_of is None else torch.zeros(n)
    return Update(torch.randn(n, rank), torch.randn(m, rank), theta, torch.tensor(0.1), spec, smooth_max=maxima)


def kernels(arch: int) -> Iterator[dict[str, Any]]:
    """Every kernel of every row of the table, by kernel function, dtype and rank."""
    settings = [("piecewise_linear", 32, 2, torch.bfloat16), ("piecewise_linear", 32, 2, torch.float32)]
    settings += [("linear", 32, 1, torch.bfloat16), ("sigmoid", 32, 1, torch.float16), ("rbf", 32, 1, torch.bfloat16)]
    settings += [("mixture", 32, 2, torch.bfloat16), ("mixture", 32, 2, torch.float32)]
    if arch == 90:  # what changes registers, once
        settings += [("piecewise_linear", 8, 2, torch.bfloat16), ("piecewise_linear", 256, 2, torch.float32)]
        settings += [("piecewise_linear", 64, 4, torch.float32), ("linear", 256, 1, torch.float32)]
    seen: set[str] = set()
    for kernel, rank, groups, dtype in settings:
        calls = core.kernel_calls(update_of(kernel, rank, groups), dtype)
        for operation in ("merge", "factor_grad", "few_tokens", "edit", "edit_grad", "select", "verify"):
            # select and verify know no weight.
            if operation not in ("select", "verify") or (rank, dtype) != (32, torch.float32):
                yield from launches(calls[operation], arch, seen)
        if rank == 32:
            update = update_of(kernel, rank, groups)
            started = core.kernel_calls(update._replace(start=update), dtype)
            for operation in ("merge", "few_tokens"):
                yield from launches(started[operation], arch, seen)
        # Shares that a kernel of their own adds, as for blocks larger than this.
        with mock.patch.object(rectangles, "adds", return_value=False):
            yield from launches(calls["factor_grad"], arch, seen)


def measure(arch: Sequence[str]) -> dict[str, Any]:
    """The kernels of those architectures, of all unless given."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError("with TRITON_INTERPRET=1 nothing is compiled: unset it")
    arches = list(map(int, arch)) or list(TABLE)
    found = [row for one in tqdm(arches, unit="architecture") for row in kernels(one)]
    return {"triton": triton.__version__, "kernels": found}


#: What the report shows of all that is compiled: the default kernel function on the usual weight.
SHOWN = "piecewise_linear 32 2"


def report(document: Document) -> str:
    """The results file as Markdown: registers a thread and shared memory, with the most of each kernel's variants."""
    rows = [row for row in document["kernels"] if row["settings"] == SHOWN or not row["settings"]]

    def most(arch: int) -> Cell:
        def cell(kernel: str) -> str:
            same = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
            registers, shared = (max((row[key] for row in same), default=0) for key in ("registers", "shared"))
            return f"{registers}, {shared / 1024:.1f} KiB"

        return cell

    columns: Columns = [("kernel", lambda kernel: f"`{kernel}`")]
    columns += [(f"sm_{arch}: registers, shared", most(arch)) for arch in sorted({row["arch"] for row in rows})]
    spilled = sum(row["stack"] + row["local"] for row in document["kernels"])
    return (
        f"{table(columns, dict.fromkeys(row['kernel'] for row in rows))}\n\n{len(document['kernels'])} kernels "
        f"compiled by Triton {document['triton']}; stack and local memory of all together: {spilled} bytes. "
        f"`{document['command']}`."
    )
