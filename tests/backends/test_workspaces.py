"""What a backend holds at a time is bounded whatever the layer: tiles, and slabs of tokens."""

from __future__ import annotations

import pytest
import torch

from snell.backends import blocked, cpu
from snell.spec import Spec
from snell.update import Update

MIB = 2**20


@pytest.mark.parametrize("m, n, rank", [(1, 1, 1), (300, 700, 4), (4096, 11008, 32), (5, 100_000, 256), (9000, 3, 64)])
def test_tiles_cover_the_matrix_once_and_hold_at_most_two_million_products(m, n, rank) -> None:
    A, B = torch.empty(n, rank, device="meta"), torch.empty(m, rank, device="meta")
    update = Update(A, B, torch.empty(2), torch.empty(()), Spec(rank, 0.5, groups=1))
    tiles = list(blocked._tiles(update))
    areas = [(i.stop - i.start) * (j.stop - j.start) for i, j in tiles]
    assert min(areas) > 0
    assert max(areas) * rank <= 2 * MIB
    assert sum(areas) == m * n
    assert len({(i.start, j.start) for i, j in tiles}) == len(tiles)
    assert all(i.stop <= m and j.stop <= n for i, j in tiles)


SIZES = [
    (1, 8, 8, 4),
    (512, 64, 64, 4),
    (513, 64, 64, 4),
    (4096, 768, 3072, 4),
    (2048, 14336, 4096, 8),
    (100, 2**20, 2**20, 8),
]


@pytest.mark.parametrize("tokens, m, n, element_size", SIZES)
def test_slabs_are_as_few_as_a_cache_and_16_MiB_of_copies_allow(tokens, m, n, element_size) -> None:
    def fits(slabs: int) -> bool:
        longest = -(-tokens // slabs)
        return longest == 1 or (longest <= 4096 and longest * (m + n) * element_size <= 16 * MIB)

    slabs = cpu.num_slabs(tokens, m, n, element_size)
    assert fits(slabs)
    assert slabs == 1 or not fits(slabs - 1)
