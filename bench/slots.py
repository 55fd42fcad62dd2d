"""What an entry of K costs a GPU kernel, read off its machine code: no GPU is needed.

A multiprocessor issues four warp instructions a clock, 128 thread-instructions: *slots*. The instructions of a kernel's
main loop over the entries of one pass of it are the slots an entry takes. The busiest pipe bounds it from below. None
of this is a measurement: waiting for memory, bank conflicts and uneven tails come on top.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget

from snell.bench.resources import specialised
from snell.kernels import launch
from snell.kernels.table import TABLE

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"

#: Thread-instructions a clock and multiprocessor by pipe: the rates of sm_80, 90 and 100 (CUDA C++ programming guide,
#: arithmetic instructions), integer work on half the lanes. What is not named counts against issue alone.
RATES = {"issue": 128, "FP32": 128, "ALU": 64, "IMAD": 64, "MUFU": 16, "load": 32}

_PIPES = {
    "FP32": ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"),
    "MUFU": ("MUFU", "I2F", "F2I", "F2F", "FRND"),
    "IMAD": ("IMAD", "IDP"),
    "load": (
        "LDG",
        "STG",
        "LDS",
        "STS",
        "LDSM",
        "STSM",
        "ATOM",
        "ATOMG",
        "ATOMS",
        "RED",
        "REDG",
        "LDGSTS",
        "LDL",
        "STL",
    ),
    "tensor": ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA"),
    "barrier": ("BAR", "DEPBAR", "MEMBAR", "SYNCS", "WARPSYNC"),
    "shuffle": ("SHFL", "REDUX", "VOTE"),
    "branch": ("BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "NOP"),
}
_PIPE = {op: pipe for pipe, ops in _PIPES.items() for op in ops}

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)([^;]*);", re.MULTILINE)


class Instruction(NamedTuple):
    """One machine instruction; ``target`` is where a branch goes."""

    address: int
    op: str
    target: int | None


class Cost(NamedTuple):
    """What one kernel takes.

    Attributes:
        slots: thread-instructions an entry. pipes: the same by pipe.
        clocks: of one multiprocessor an entry, by the busiest of issue and pipes. A prediction.
        blocks: programs that share a multiprocessor, by their registers and warps.
    """

    kernel: str
    slots: float
    pipes: dict[str, float]
    clocks: float
    registers: int
    shared: int
    spilled: int
    warps: int
    blocks: int


def pipe(op: str) -> str:
    """The pipe an instruction runs on; what the uniform datapath does takes issue alone."""
    return _PIPE.get(op, "uniform" if op.startswith("U") or op in ("S2UR", "R2UR") else "ALU")


def instructions(sass: str) -> list[Instruction]:
    """The instructions of a disassembly by cuobjdump."""
    found = []
    for address, op, _, operands in _INSTRUCTION.findall(sass):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if op == "BRA" else None
        found.append(Instruction(int(address, 16), op, int(target[1], 16) if target else None))
    return found


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with at least half of the kernel's float32 arithmetic; the whole kernel if there is none."""

    def arithmetic(part: list[Instruction]) -> int:
        return sum(pipe(one.op) == "FP32" for one in part)

    bodies = [
        [other for other in code if one.target <= other.address <= one.address]
        for one in code
        if one.target is not None and one.target <= one.address
    ]
    bodies = [body for body in bodies if body and 2 * arithmetic(body) >= arithmetic(code) and arithmetic(body)]
    return min(bodies, key=len, default=code)


def launched(function: Callable[..., Any], *args: Any, arch: int) -> list[tuple[Any, tuple, dict[str, Any]]]:
    """The launches that ``function`` would make on ``arch``: kernel, arguments and options. Nothing runs."""
    found = []

    def run(kernel: Any, grid: Any, args: tuple, row: Any = None, **meta: Any) -> None:
        warps = {} if row is None else {"num_warps": row.num_warps}
        found.append((kernel, args, meta | warps | {"enable_fp_fusion": False}))

    with mock.patch.object(launch, "run", run), mock.patch.object(launch, "row", lambda name, _: TABLE[arch][name]):
        function(*args)
    return found


def cost(kernel: Any, args: tuple, options: dict[str, Any], arch: int) -> Cost:
    """Compile one launch for ``arch`` and read its cost; the kernel's tile is BLOCK_M by BLOCK_N."""
    meta = {name: value for name, value in options.items() if name in kernel.arg_names}
    compiler = {name: value for name, value in options.items() if name not in kernel.arg_names}
    compiled = triton.compile(specialised(kernel, args, meta), target=GPUTarget("cuda", arch, 32), options=compiler)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout

        code, usage = instructions(dump("-sass")), dump("--dump-resource-usage")
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    warps = compiled.metadata.num_warps
    entries = meta["BLOCK_M"] * meta["BLOCK_N"] / (32 * warps)
    pipes = {name: n / entries for name, n in Counter(pipe(one.op) for one in main_loop(code)).most_common()}
    slots = sum(pipes.values())
    clocks = max(slots / RATES["issue"], *(n / RATES[name] for name, n in pipes.items() if name in RATES))
    registers = -(-used["REG"] // 8) * 8
    return Cost(
        kernel.__name__,
        slots,
        pipes,
        clocks,
        used["REG"],
        used["SHARED"] + compiled.metadata.shared,
        used["STACK"] + used["LOCAL"],
        warps,
        min(64 // warps, 65536 // (registers * 32 * warps)),
    )


def costs(function: Callable[..., Any], *args: Any, arch: int = 90) -> list[Cost]:
    """The cost of every kernel with a tile that ``function`` would launch; each once."""
    seen: dict[str, Cost] = {}
    for kernel, kernel_args, options in launched(function, *args, arch=arch):
        if "BLOCK_M" in options and kernel.__name__ not in seen:
            seen[kernel.__name__] = cost(kernel, kernel_args, options, arch)
    return list(seen.values())
