"""Registers, shared memory, stack and local bytes of every GPU kernel, compiled ahead of time: no GPU is needed.

The host functions run as they are, on CPU tensors; only the launch is replaced, by a compilation for the
specialisation that launch would have got: what is read off the machine code is what a GPU would run.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
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

from snell.bench.record import out_option, write
from snell.kernels import factor_grad, few_tokens, launch, merge, selection
from snell.kernels.table import TABLE

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
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    if usage.keys() != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump told no resources: {dump!r}")
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "settings": " ".join(str(meta[k]) for k in ("KERNEL", "RANK", "GROUPS") if k in meta),
        "dtypes": " ".join(sorted({str(t.dtype).removeprefix("torch.") for t in args if isinstance(t, torch.Tensor)})),
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        # Triton's tiles are dynamic shared memory, which the machine code does not tell of.
        "shared": usage["SHARED"] + compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }


#: What this process has read already: a pass launches some kernels several times.
_COMPILED: set[tuple[str, str, int]] = set()


def launches(function: Callable, *args: Any, arch: int, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The resources of every kernel that ``function`` would launch on ``arch``; each specialisation once."""
    found: list[tuple] = []

    def run(kernel, grid, args, row=None, **meta):
        found.append((kernel, args, meta | ({"num_warps": row.num_warps} if row else {}) | {"enable_fp_fusion": False}))

    def row(operation, like):
        return TABLE[arch][operation]

    with mock.patch.object(launch, "run", run), mock.patch.object(launch, "row", row):
        function(*args, **kwargs)
    for kernel, kernel_args, options in found:
        source = specialised(kernel, kernel_args, {k: v for k, v in options.items() if k in kernel.arg_names})
        key = (source.hash(), str(options), arch)
        if key not in _COMPILED:
            _COMPILED.add(key)
            yield resources(kernel, kernel_args, options, arch)


def update_of(rank: int, theta: int, m: int = 128, n: int = 256) -> tuple[torch.Tensor, ...]:
    return torch.randn(n, rank), torch.randn(m, rank), torch.full((theta,), 0.1), torch.tensor(0.1)


def operations(arch: int) -> Iterator[dict[str, Any]]:
    """Every kernel of every row of the table, by kernel function, dtype and rank."""
    settings = [("piecewise_linear", 2, 2, 32, torch.bfloat16), ("piecewise_linear", 2, 2, 32, torch.float32)]
    settings += [
        ("linear", 1, 0, 32, torch.bfloat16),
        ("sigmoid", 1, 3, 32, torch.float16),
        ("rbf", 1, 3, 32, torch.bfloat16),
    ]
    if arch == 90:  # what changes registers, once
        settings += [("piecewise_linear", 2, 2, 8, torch.bfloat16), ("piecewise_linear", 2, 2, 256, torch.float32)]
        settings += [("piecewise_linear", 4, 4, 64, torch.float32), ("linear", 1, 0, 256, torch.float32)]
    for kernel, groups, num_theta, rank, dtype in settings:
        A, B, theta, tau = update_of(rank, num_theta)
        weight = torch.zeros(B.shape[0], A.shape[0], dtype=dtype)
        x, rest = torch.zeros(4, A.shape[0], dtype=dtype), (kernel, groups, "soft")
        grads = [torch.zeros_like(t) for t in (A, B, theta)]
        yield from launches(merge.merge_out, A, B, theta, tau, weight, weight, *rest, arch=arch)
        yield from launches(factor_grad.factor_grad, weight, A, B, theta, tau, weight, weight, *grads, *rest, arch=arch)
        yield from launches(few_tokens.linear_few, x, weight, weight[:, 0], A, B, theta, tau, *rest, arch=arch)
        if (rank, dtype) != (32, torch.float32):  # select knows no weight
            yield from launches(
                selection.select_thresholds, [selection.Update(A, B, theta, 0.9)], kernel, groups, arch=arch
            )


#: What the report shows of all that is compiled: the default kernel function on the usual weight.
SHOWN = "piecewise_linear 32 2"


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown: registers a thread and shared memory, with the most of each kernel's variants."""
    rows = [row for row in document["kernels"] if row["settings"] == SHOWN or not row["settings"]]
    arches = sorted({row["arch"] for row in rows})
    columns = [f"sm_{arch}: registers, shared" for arch in arches]
    lines = [f"| kernel | {' | '.join(columns)} |", "|---|" + "---|" * len(arches)]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for arch in arches:
            same = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
            most = {key: max((row[key] for row in same), default=0) for key in ("registers", "shared")}
            cells.append(f"{most['registers']}, {most['shared'] / 1024:.1f} KiB")
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    spilled = sum(row["stack"] + row["local"] for row in document["kernels"])
    return (
        "\n".join(lines)
        + f"\n\n{len(document['kernels'])} kernels compiled by Triton {document['triton']}; "
        + f"stack and local memory of all together: {spilled} bytes. `{document['command']}`."
    )


@click.command(help=__doc__)
@click.option(
    "--arch", type=click.Choice(list(map(str, TABLE))), multiple=True, help="May be repeated; all unless given."
)
@out_option
def main(arch: tuple[str, ...], out: Path) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError("with TRITON_INTERPRET=1 nothing is compiled: unset it")
    kernels = []
    for one in tqdm(list(map(int, arch)) or list(TABLE), unit="architecture"):
        kernels += operations(one)
    document = {"triton": triton.__version__, "kernels": kernels}
    click.echo(report({"command": "snell bench resources", **document}))
    write(out, "resources", document)


if __name__ == "__main__":
    main()
