"""Launch parameters by architecture and operation, with the reason beside each row.

Chosen from the compiler's own figures (registers, no spill, instructions an entry), not from timings: a
64 x 64 tile of 4 warps holds 32 entries a thread, the most at which K, its statistics and the tile it is
combined with stay in registers with 4 blocks on a multiprocessor. ``python -m bench.tune`` times the
candidates on a GPU and prints a new row.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Tile of one program, its warps, and what reads in that kernel's own file what it means."""

    block_m: int
    block_n: int
    num_warps: int


#: 16 consecutive bytes of a bf16 weight a thread, 8 threads a row: whole 128-byte lines both ways.
_MERGE = Row(64, 64, 4)
#: Nothing is loaded but factors: 8 rows x 4 columns a thread reads 12 numbers for 32 entries.
_SELECT = Row(8, 512, 4)
#: As merge, and partial sums of r (1/block_m + 1/block_n) numbers an entry.
_FACTOR_GRAD = Row(64, 64, 4)
#: 64 rows feed one matrix instruction; the columns' loop keeps loads in flight.
_FEW_TOKENS = Row(64, 64, 4)

_ROWS = {"merge": _MERGE, "select": _SELECT, "factor_grad": _FACTOR_GRAD, "few_tokens": _FEW_TOKENS}

#: The three share rows until a machine of each says otherwise: their register files are equal (64 k a
#: multiprocessor, 255 a thread) and no kernel needs more shared memory than the smallest (163 KiB) has.
TABLE: dict[int, dict[str, Row]] = {80: dict(_ROWS), 90: dict(_ROWS), 100: dict(_ROWS)}
