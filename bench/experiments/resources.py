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
from triton.compiler import ASTSource

from snell.bench import core
from snell.bench.core import Update
from snell.bench.report import Cell, Columns, Document, table
from snell.kernels import launch
from snell.kernels.table import TABLE
from snell.spec import Spec

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
POINTERS |= {torch.int32: "*i32", torch.int64: "*i64"}


def specialised(kernel: Any, args: tuple, meta: dict[str, Any]) -> ASTSource:
    """The source as a launch with ``args`` specialises it: ints of 1, and ints and addresses divisible by 16."""
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if number % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in meta.items():
        signature[name], constants[name] = "constexpr", value
    return ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, constants, attributes)


def resources(kernel: Any, args: tuple, options: dict[str, Any], arch: int) -> dict[str, Any]:
    """Registers, shared memory, stack and local bytes of one kernel compiled for ``arch``."""
    meta = {name: value for name, value in options.items() if name in kernel.arg_names}
    compiler = {name: value for name, value in options.items() if name not in kernel.arg_names}
    compiled = triton.compile(specialised(kernel, args, meta), target=GPUTarget("cuda", arch, 32), options=compiler)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    if usage.keys() != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump told no resources: {dump!r}")
    settings = " ".join(str(meta[k]) for k in ("KERNEL", "RANK", "GROUPS") if k in meta)
    dtypes = " ".join(sorted({str(t.dtype).removeprefix("torch.") for t in args if isinstance(t, torch.Tensor)}))
    return {
        **{"kernel": kernel.__name__, "arch": arch, "settings": settings, "dtypes": dtypes},
        **{"registers": usage["REG"], "stack": usage["STACK"], "local": usage["LOCAL"]},
        # Triton's tiles are dynamic shared memory, which the machine code does not tell of.
        **{"shared": usage["SHARED"] + compiled.metadata.shared, "warps": compiled.metadata.num_warps},
    }


def launches(call: Callable[[], object], arch: int, seen: set[tuple]) -> Iterator[dict[str, Any]]:
    """The resources of every kernel that ``call`` would launch on ``arch``, but for specialisations in ``seen``."""
    found: list[tuple] = []

    def run(kernel, grid, args, row=None, **meta):
        found.append((kernel, args, meta | ({"num_warps": row.num_warps} if row else {}) | {"enable_fp_fusion": False}))

    def row(operation, like):
        return TABLE[arch][operation]

    with mock.patch.object(launch, "run", run), mock.patch.object(launch, "row", row):
        call()
    for kernel, args, options in found:
        source = specialised(kernel, args, {k: v for k, v in options.items() if k in kernel.arg_names})
        key = (source.hash(), str(options), arch)
        if key not in seen:
            seen.add(key)
            yield resources(kernel, args, options, arch)


def update_of(kernel: str, rank: int, groups: int, m: int = 128, n: int = 256) -> Update:
    """An update whose values do not matter, as nothing is launched."""
    spec = Spec(rank, 0.9, kernel, groups)
    theta = torch.full((spec.num_theta,), 0.1)
    return Update(torch.randn(n, rank), torch.randn(m, rank), theta, torch.tensor(0.1), spec)


def kernels(arch: int) -> Iterator[dict[str, Any]]:
    """Every kernel of every row of the table, by kernel function, dtype and rank."""
    settings = [("piecewise_linear", 32, 2, torch.bfloat16), ("piecewise_linear", 32, 2, torch.float32)]
    settings += [("linear", 32, 1, torch.bfloat16), ("sigmoid", 32, 1, torch.float16), ("rbf", 32, 1, torch.bfloat16)]
    if arch == 90:  # what changes registers, once
        settings += [("piecewise_linear", 8, 2, torch.bfloat16), ("piecewise_linear", 256, 2, torch.float32)]
        settings += [("piecewise_linear", 64, 4, torch.float32), ("linear", 256, 1, torch.float32)]
    seen: set[tuple] = set()
    for kernel, rank, groups, dtype in settings:
        calls = core.kernel_calls(update_of(kernel, rank, groups), dtype)
        for operation in ("merge", "factor_grad", "few_tokens", "select", "verify"):
            # select and verify know no weight.
            if operation not in ("select", "verify") or (rank, dtype) != (32, torch.float32):
                yield from launches(calls[operation], arch, seen)


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
