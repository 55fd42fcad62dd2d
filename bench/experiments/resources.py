"""Registers, memory and predicted cost of every GPU kernel, compiled ahead of time: no GPU is needed.

The host functions run as they are, on CPU tensors; only the launch is replaced, by a compilation for the
specialisation that launch would have got: what is read off the machine code is what a GPU would run.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
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
from snell.bench import core, slots
from snell.bench.core import Update
from snell.bench.report import Cell, Columns, Document, table
from snell.kernels import launch, rectangles, split
from snell.kernels.table import HALVES, TABLE, Row
from snell.spec import Spec

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


#: What the report shows of all that is compiled: the default kernel function on the usual weight.
SHOWN = "piecewise_linear 32 2"

#: How K is computed, and the settings that stand for it.
FAMILIES = {"direct": SHOWN, "tensor cores": f"{SHOWN} tensor cores"}

#: The kernels with a tile of K, and the bytes of matrices that an entry moves with a weight in bfloat16.
TILED = {"count_kernel": 0, "merge_kernel": 4, "factor_grad_kernel": 6, "few_tokens_kernel": 2}

#: The kernels of a training step, and the shapes (in x out) and tokens they are predicted for.
STEP = ("count_kernel", "merge_kernel", "factor_grad_kernel")
SHAPES, TOKENS = ((4096, 4096), (4096, 11008), (8192, 28672)), (8192, 2048)


class _Target:
    """In place of Triton's driver: a GPU that kernels are compiled for and cannot run on."""

    def __init__(self, arch: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        # A kernel remembers what it compiled by the device: one for each architecture.
        self.get_current_device, self.get_current_stream = lambda: arch, lambda _: 0


def _dump(cubin: Path, *what: str) -> str:
    return subprocess.run([CUOBJDUMP, *what, cubin], capture_output=True, text=True, check=True).stdout


def resources(compiled: Any, arch: int, tile: int) -> dict[str, Any]:
    """What one compiled kernel takes: registers and bytes of memory, and slots if it has a tile of so many entries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = _dump(Path(file.name), "--dump-resource-usage"), _dump(Path(file.name), "-sass") if tile else ""
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    if used.keys() != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump told no resources: {usage!r}")
    # Triton's tiles are dynamic shared memory, which the machine code does not tell of.
    shared, warps = used["SHARED"] + compiled.metadata.shared, compiled.metadata.num_warps
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"],
        "shared": shared,
        "warps": warps,
        "resident": slots.resident(arch, used["REG"], shared, warps),
        "slots": slots.slots(sass, tile / (32 * warps)) if tile else None,
    }


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
            named = dict(zip(kernel.arg_names, args, strict=False))
            settings += " tensor cores" if named.get("halves") else ""
            settings += " start" if named.get("start") else ""
            dtypes = {str(t.dtype).removeprefix("torch.") for t in args if isinstance(t, torch.Tensor)}
            facts = {"kernel": kernel.__name__, "arch": arch, "settings": settings, "dtypes": " ".join(sorted(dtypes))}
            # Disassembling takes longest: of what the report shows alone.
            counted = kernel.__name__ in TILED and settings in FAMILIES.values()
            tile = meta["BLOCK_M"] * meta["BLOCK_N"] if counted else 0
            found.append(facts | resources(compiled, arch, tile))

    def row(operation: str, like: torch.Tensor, halves: tuple | None = None) -> Row:
        return (HALVES if halves else TABLE[arch])[operation]

    driver.set_active(_Target(arch))
    here = mock.patch.multiple(launch, run=run, row=row)
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
    for (kernel, rank, groups, dtype), on in product(settings, (False, True)):
        if on and (rank != 32 or dtype == torch.float32):
            continue  # these spill: K on tensor cores is for weights in half precision

        def call(operation: str, started: bool = False) -> Callable[[], object]:
            update = update_of(kernel, rank, groups)  # noqa: B023 (called in this turn)
            update = update._replace(start=update) if started else update
            return lambda: core.kernel_calls(update, dtype)[operation]()  # noqa: B023

        with split.use(on):
            for operation in ("merge", "factor_grad", "few_tokens", "edit", "edit_grad", "select", "verify"):
                # select and verify know no weight.
                if operation not in ("select", "verify") or (rank, dtype) != (32, torch.float32):
                    yield from launches(call(operation), arch, seen)
            if rank == 32:
                for operation in ("merge", "few_tokens"):
                    yield from launches(call(operation, started=True), arch, seen)
            # Shares that a kernel of their own adds, as for blocks larger than this.
            with mock.patch.object(rectangles, "adds", return_value=False):
                yield from launches(call("factor_grad"), arch, seen)


def measure(arch: Sequence[str]) -> dict[str, Any]:
    """The kernels of those architectures, of all unless given."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError("with TRITON_INTERPRET=1 nothing is compiled: unset it")
    arches = list(map(int, arch)) or list(TABLE)
    found = [row for one in tqdm(arches, unit="architecture") for row in kernels(one)]
    return {"triton": triton.__version__, "kernels": found}


def _maxima(document: Document) -> str:
    """Registers a thread and shared memory, with the most of each kernel's variants."""
    rows = [row for row in document["kernels"] if row["settings"] == SHOWN or not row["settings"]]

    def most(arch: int) -> Cell:
        def cell(kernel: str) -> str:
            same = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
            registers, shared = (max((row[key] for row in same), default=0) for key in ("registers", "shared"))
            return f"{registers}, {shared / 1024:.1f} KiB"

        return cell

    columns: Columns = [("kernel", lambda kernel: f"`{kernel}`")]
    columns += [(f"sm_{arch}: registers, shared", most(arch)) for arch in sorted({row["arch"] for row in rows})]
    return table(columns, dict.fromkeys(row["kernel"] for row in rows))


def _clocks(row: dict[str, Any]) -> float:
    return slots.clocks(row["slots"], TILED[row["kernel"]])


def _costs(costly: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """Slots an entry of each kernel with a tile of K, by family."""

    def of(pipe: str) -> Cell:
        return lambda key: f"{costly[key]['slots'].get(pipe, 0):.1f}"

    columns: Columns = [
        ("K", lambda key: key[0]),
        ("kernel", lambda key: f"`{key[1]}`"),
        ("slots", lambda key: f"{slots.total(costly[key]['slots']):.1f}"),
        *((pipe, of(pipe)) for pipe in ("FP32", "integer", "multiply", "loads", "MUFU", "tensor", "other")),
        ("registers, blocks resident", lambda key: "{registers}, {resident}".format(**costly[key])),
        ("predicted clocks", lambda key: f"{_clocks(costly[key]):.2f}"),
    ]
    return table(columns, costly)


def _predictions(costly: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """Predicted microseconds of a training step's kernels beside the floor, by family."""

    def time(case: tuple[str, int, int, int], *kernels: str) -> float:
        family, n, m, _ = case
        return sum(slots.microseconds(n * m, _clocks(costly[family, kernel])) for kernel in kernels)

    def floor(case: tuple[str, int, int, int]) -> float:
        return slots.floor(case[1] * case[2], case[3])

    columns: Columns = [
        ("K", lambda case: case[0]),
        ("in x out, tokens", lambda case: "{} x {}, {}".format(*case[1:])),
        ("floor", lambda case: f"{floor(case):.0f} us"),
        *((f"`{kernel}`", lambda case, kernel=kernel: f"{time(case, kernel):.0f} us") for kernel in STEP),
        ("predicted over the floor", lambda case: f"+{time(case, *STEP) / floor(case):.1%}"),
    ]
    return table(columns, [(family, *shape, tokens) for family in FAMILIES for tokens in TOKENS for shape in SHAPES])


def report(document: Document) -> str:
    """The results file as Markdown."""
    costly: dict[tuple[str, str], dict[str, Any]] = {}
    for family, settings in FAMILIES.items():
        for row in document["kernels"]:
            if (row["arch"], row["settings"]) == (90, settings) and row["slots"]:
                costly.setdefault((family, row["kernel"]), row)
    spilled = sum(row["stack"] + row["local"] for row in document["kernels"])
    parts = [_maxima(document)]
    if costly:
        parts += [
            "Slots an entry on sm_90 with a bfloat16 weight (thread-instructions of the main loop, by pipe):",
            _costs(costly),
            "What they predict for an H100, which nothing has measured:",
            _predictions(costly),
        ]
    parts.append(
        f"{len(document['kernels'])} kernels compiled by Triton {document['triton']}; stack and local memory of all "
        f"together: {spilled} bytes. `{document['command']}`."
    )
    return "\n\n".join(parts)
