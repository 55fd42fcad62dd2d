"""Which rectangle of tiles each program of factor_grad owns."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from snell.kernels.table import Row

#: What G and its shares may take together, and what shares may take however large G is.
TOTAL_BYTES, LEAST_BYTES = 32 * 2**20, 4 * 2**20

#: Shares that one program may add at the end: more would take longer than another launch.
ADDED_BYTES = 2**19

#: What a launch costs beside its work, in tiles of a program: each takes some 4 us.
_LAUNCH = 2


class Plan(NamedTuple):
    """Rows of one launch, and the tiles of a program's rectangle."""

    height: int
    tall: int
    wide: int


def budget(G: Tensor) -> int:
    """Bytes that the shares of one launch may take."""
    return max(LEAST_BYTES, TOTAL_BYTES - G.numel() * G.element_size())


@lru_cache(maxsize=1024)
def plan(m: int, n: int, rank: int, row: Row, processors: int, limit: int) -> Plan:
    """The launches and rectangles that take least time, by the tiles that the busiest processor gets.

    Where no plan keeps within ``limit`` bytes, the one that takes fewest.
    """
    best = None
    tiles_m, tiles_n = -(-m // row.block_m), -(-n // row.block_n)
    launches = 1
    while launches <= tiles_m:
        high = -(-tiles_m // launches)
        for wide in range(1, tiles_n + 1):
            across = -(-tiles_n // wide)
            for waves in (1, 2, 3, 4):
                tall = -(-high // max(1, waves * processors // across))
                down = -(-high // tall)
                shares = 4 * rank * (down * n * (down > 1) + across * high * row.block_m * (across > 1))
                rounds = -(-down * across // processors)
                count = -(-tiles_m // high)
                cost = count * (rounds * tall * wide + _LAUNCH)
                key = (shares > limit, shares if shares > limit else cost, shares)
                if best is None or key < best[0]:
                    best = key, Plan(high * row.block_m, tall, wide)
        launches *= 2
    assert best is not None
    return best[1]


def adds(plan: Plan, row: Row, rank: int, down: int, across: int) -> bool:
    """Whether the programs themselves add the shares: nothing to add, or little for each."""
    columns = down * plan.wide * row.block_n * (down > 1)
    rows = across * plan.tall * row.block_m * (across > 1)
    return 4 * rank * max(columns, rows) <= ADDED_BYTES
