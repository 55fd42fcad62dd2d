"""Launch parameters by architecture and operation, with the reason beside each row.

Chosen from the compiler's own figures (registers, no spill, instructions an entry), not from timings.
``snell bench tune`` times the candidates on a GPU and prints a new row.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Tile of one program, its warps, and what reads in that kernel's own file what it means."""

    block_m: int
    block_n: int
    num_warps: int


#: 16 consecutive bytes of a bf16 weight a thread, 8 threads a row: whole 128-byte lines both ways. 16 entries
#: a thread leave K 64 registers at r = 32, so that 4 blocks share a multiprocessor, and none spills at r = 256.
_MERGE = Row(64, 64, 8)
#: Nothing is loaded but factors: 16 entries a thread, 128 registers, 4 blocks a multiprocessor; 4 rows of 512 columns
#: take 1 % fewer instructions and spill with four groups.
_SELECT = Row(8, 256, 4)
#: As merge; its two products take 168 registers a thread with a half-precision G, and 32 entries spill.
_FACTOR_GRAD = Row(64, 64, 8)
#: More than two groups, or a softmax: 8 entries a thread, or their norms spill; 3 blocks a multiprocessor.
_FACTOR_GRAD_MANY = Row(32, 32, 4)
#: As merge: 64 rows feed one matrix instruction, and its columns are walked in strides of 64.
_FEW_TOKENS = Row(64, 64, 8)

#: Memory alone bounds both: 16 numbers a thread, so that each thread reads and writes whole 16 bytes.
_EDIT = Row(8, 512, 8)
#: As edit, with two sums a number.
_EDIT_GRAD = Row(16, 128, 4)

_ROWS = {
    "merge": _MERGE,
    "select": _SELECT,
    "factor_grad": _FACTOR_GRAD,
    "factor_grad_many": _FACTOR_GRAD_MANY,
    "softmax_grad": _MERGE,
    "few_tokens": _FEW_TOKENS,
    "edit": _EDIT,
    "edit_grad": _EDIT_GRAD,
}

#: sm_80 and sm_90 share rows until a machine of each says otherwise: their register files are equal (64 k a
#: multiprocessor, 255 a thread) and no kernel needs more shared memory than the smaller (163 KiB) has. factor_grad's
#: tiles are halved on sm_80, where 64 rows spill a few bytes. They are halved on sm_100 too, where a tile of 64 rows
#: gets its matrix instruction from tensor memory, whose moves spill.
TABLE: dict[int, dict[str, Row]] = {
    80: {**_ROWS, "factor_grad": Row(32, 64, 8)},
    90: dict(_ROWS),
    100: {**_ROWS, "factor_grad": Row(32, 64, 8), "few_tokens": Row(64, 32, 4)},
}

#: Where K is computed on tensor cores, on every architecture. 32 rows get ``mma.sync``, not an instruction of warp
#: groups or of tensor memory. Two warps, one above the other: with more, side by side, each would compute all columns
#: of K again for the second product of factor_grad and few_tokens. Select has no second product, and sorts its buckets
#: in the registers of four warps. 32 entries a thread; factor_grad and softmax_grad spill with more than 16, and
#: few_tokens if it subtracts a start.
HALVES: dict[str, Row] = {
    "merge": Row(32, 64, 2),
    "select": Row(32, 128, 4),
    "few_tokens": Row(32, 32, 2),
    "factor_grad": Row(32, 32, 2),
    "factor_grad_many": Row(32, 32, 2),
    "softmax_grad": Row(32, 32, 2),
}
