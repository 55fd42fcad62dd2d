"""What an entry of K costs a GPU kernel, read off its machine code: no GPU is needed.

A multiprocessor issues four warp instructions a clock, 128 thread-instructions: *slots*. The instructions of a kernel's
main loop, over the entries of one pass through it, are the slots an entry takes. The busiest of issue, pipes and memory
bounds the time from below. Nothing here is measured: latencies, bank conflicts and the last wave come on top.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

#: Thread-instructions a clock and multiprocessor by pipe (CUDA C++ programming guide, arithmetic instructions). Integer
#: work and comparisons have half the lanes, and multiply-adds of integers share the heavy half of those of FP32.
RATES = {"FP32": 128, "integer": 64, "multiply": 64, "MUFU": 16, "loads": 32}

#: Of an H100: multiprocessors and clocks a second; bytes a clock and multiprocessor at 3.35e12 a second; and FP32
#: accumulated multiply-adds of half precision a clock and multiprocessor, of which ``mma.sync`` reaches 62 %.
PROCESSORS, HERTZ = 132, 1.755e9
BYTES = 3.35e12 / PROCESSORS / HERTZ
PRODUCTS, SYNCHRONOUS = 2048, 0.62

#: Registers, shared memory (1 KiB of it reserved a block), warps and blocks of a multiprocessor.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}

_PIPES = {
    "FP32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2",
    "multiply": "IMAD IDP",
    "MUFU": "MUFU I2F F2I F2F FRND",
    "loads": "LDG STG LDS STS LDSM STSM LDGSTS LDL STL LDC ATOM ATOMG ATOMS RED REDG SHFL LDTM STTM",
    "tensor": "HMMA HGMMA UTCHMMA",
    "other": "BAR DEPBAR MEMBAR SYNCS WARPSYNC WARPGROUP BRA EXIT CALL RET BSSY BSYNC BREAK NOP VOTE REDUX",
}
_PIPE = {op: pipe for pipe, ops in _PIPES.items() for op in ops.split()}

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)([^;]*);", re.MULTILINE)


class Instruction(NamedTuple):
    """One machine instruction; ``target`` is where a branch goes."""

    address: int
    op: str
    modifiers: str = ""
    target: int | None = None

    @property
    def pipe(self) -> str:
        """Where it runs; the uniform datapath takes issue alone."""
        uniform = self.op.startswith("U") or self.op in ("S2UR", "R2UR")
        return _PIPE.get(self.op, "other" if uniform else "integer")

    @property
    def products(self) -> float:
        """Multiply-adds of half precision that a thread's share of a matrix instruction takes as long as."""
        wide = re.match(r"\.(\d+)x(\d+)x(\d+)", self.modifiers)
        m, n, k = map(int, wide.groups()) if wide else (16, 8, 16 if ".16816" in self.modifiers else 8)
        threads = 128 if wide else 32 * SYNCHRONOUS
        return m * n * k / threads * (2 if "TF32" in self.modifiers else 1)


def instructions(sass: str) -> list[Instruction]:
    """The instructions of a disassembly by cuobjdump."""
    found = []
    for address, op, modifiers, operands in _INSTRUCTION.findall(sass):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if op == "BRA" else None
        found.append(Instruction(int(address, 16), op, modifiers, int(target[1], 16) if target else None))
    return found


def _seldom(code: list[Instruction]) -> list[Instruction]:
    """What lies in branches that hold a loop: paths for single entries, such as the distances that are taken again."""
    leaps = [(one.address, one.target) for one in code if one.target is not None and one.target > one.address]
    loops = [(one.target, one.address) for one in code if one.target is not None and one.target < one.address]
    leaps = [leap for leap in leaps if any(leap[0] < start and end < leap[1] for start, end in loops)]
    return [one for one in code if any(start < one.address < end for start, end in leaps)]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """What every tile runs: the innermost loop with at least half of the kernel's arithmetic, or all if there is none.

    Branches that hold loops of their own are left out of it.
    """

    def arithmetic(part: list[Instruction]) -> float:
        return sum(one.products if one.pipe == "tensor" else one.pipe == "FP32" for one in part)

    bodies = [
        [other for other in code if one.target <= other.address <= one.address]
        for one in code
        if one.target is not None and one.target < one.address
    ]
    bodies = [body for body in bodies if 2 * arithmetic(body) >= arithmetic(code) > 0]
    body = min(bodies, key=len, default=code)
    seldom = set(_seldom(body))
    return [one for one in body if one not in seldom]


def slots(sass: str, entries: float) -> dict[str, float]:
    """Thread-instructions an entry by pipe, of a kernel whose threads own ``entries`` of a tile each.

    ``products``: the multiply-adds of half precision that the matrix instructions take as long as.
    """
    loop = main_loop(instructions(sass))
    found = {pipe: count / entries for pipe, count in Counter(one.pipe for one in loop).most_common()}
    return found | {"products": sum(one.products for one in loop if one.pipe == "tensor") / entries}


def total(found: Mapping[str, float]) -> float:
    """All slots of an entry."""
    return sum(count for pipe, count in found.items() if pipe != "products")


def clocks(found: Mapping[str, float], moved: float = 0.0) -> float:
    """Predicted clocks of one multiprocessor of an H100 for an entry that moves that many bytes of matrices."""
    pipes = [found.get(pipe, 0.0) / rate for pipe, rate in RATES.items()]
    return max(total(found) / 128, found["products"] / PRODUCTS, moved / BYTES, *pipes)


def microseconds(entries: float, per_entry: float) -> float:
    """Predicted time of an H100 for that many entries at so many clocks each."""
    return entries * per_entry / (PROCESSORS * HERTZ) * 1e6


def floor(entries: float, tokens: int) -> float:
    """Microseconds of the three GEMMs of a layer in bfloat16 at 790 TFLOP/s, which an H100's libraries reach."""
    return 6 * entries * tokens / 790e12 * 1e6


def resident(arch: int, registers: int, shared: int, warps: int) -> int:
    """Blocks that share a multiprocessor."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(BLOCKS, WARPS // warps, by_registers, SHARED[arch] // (shared + 1024))
