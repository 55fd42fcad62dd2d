"""Cuts of a layer into blocks whose GEMMs fill whole waves of a GPU's multiprocessors.

A GEMM runs in tiles, as many at a time as there are multiprocessors; a last wave that is not full takes as long as a
full one. The cut with the least time, predicted so, need not have blocks of one length.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

__all__ = ["columns", "num_processors", "rows"]

#: Bytes of one block of W0 + dW in forward; and of G in backward, whose factor gradients need a workspace of 4 MiB
#: beside it (``kernels/rectangles.py``): within 32 MiB each.
FORWARD_BYTES, BACKWARD_BYTES = 31 * 2**20, 28 * 2**20

#: Blocks are multiples of this many rows or columns.
MULTIPLE = 64

#: Tiles that GEMM libraries have for half precision, and the share of a multiprocessor's rate that they reach: the
#: smaller, the more operands are loaded for a product. Estimates, not measurements.
_TILES = ((256, 128, 1.0), (192, 128, 0.97), (128, 128, 0.9), (256, 64, 0.85), (128, 64, 0.75))

#: What a block costs beside its waves, in multiply-adds of one multiprocessor: some 5 us at 3e12 a second.
_BLOCK = 5e-6 * 3e12


@lru_cache(maxsize=4096)
def efficiency(m: int, n: int, processors: int) -> float:
    """The share of the device's rate that a GEMM with an output of ``[m, n]`` reaches, of the best tile."""
    either_way = [tile for a, b, rate in _TILES for tile in ((a, b, rate), (b, a, rate))]
    return max(
        rate * m * n / (math.ceil(math.ceil(m / a) * math.ceil(n / b) / processors) * processors * a * b)
        for a, b, rate in either_way
    )


def _cut(lines: int, longest: int, costs: dict[int, float]) -> list[int]:
    """Lengths that sum to ``lines`` at least cost: multiples of MULTIPLE, the last one whatever is left."""
    units, rest = divmod(lines, MULTIPLE)
    if rest:
        units += 1
    best = [0.0] + [math.inf] * units
    last = [0] * (units + 1)
    for end in range(1, units + 1):
        for length in range(1, min(longest, end) + 1):
            cost = best[end - length] + costs[length]
            if cost < best[end]:
                best[end], last[end] = cost, length
    found = []
    while units:
        found.append(last[units] * MULTIPLE)
        units -= last[units]
    found.sort(reverse=True)
    if rest:
        found[-1] -= MULTIPLE - rest
    return found


def _lengths(lines: int, bytes_per_line: int, limit: int) -> range:
    """The lengths a block may have, in units of MULTIPLE."""
    return range(1, max(1, min(limit // bytes_per_line, lines + MULTIPLE - 1) // MULTIPLE) + 1)


def rows(tokens: int, m: int, n: int, element_size: int, processors: int) -> tuple[int, ...]:
    """Rows of each block of W0 + dW ``[m, n]`` in forward, ``y[:, rows] = x W[rows]^T``: the longest first."""
    return _rows(_rounded(tokens), m, n, element_size, processors)


def columns(tokens: int, m: int, n: int, element_size: int, processors: int) -> tuple[int, ...]:
    """Columns of each block in backward, ``G = dY^T X[:, columns]`` and ``dX[:, columns] = dY W[:, columns]``."""
    return _columns(_rounded(tokens), m, n, element_size, processors)


def _rounded(tokens: int) -> int:
    """Sequences of any length share a cut: a new one takes the host some milliseconds."""
    return max(-(-tokens // 256), 1) * 256


@lru_cache(maxsize=1024)
def _rows(tokens: int, m: int, n: int, element_size: int, processors: int) -> tuple[int, ...]:
    lengths = _lengths(m, n * element_size, FORWARD_BYTES)
    costs = {}
    for length in lengths:
        block = length * MULTIPLE
        costs[length] = block * n * tokens / efficiency(tokens, block, processors) + _BLOCK * processors
    return tuple(_cut(m, lengths[-1], costs))


@lru_cache(maxsize=1024)
def _columns(tokens: int, m: int, n: int, element_size: int, processors: int) -> tuple[int, ...]:
    lengths = _lengths(n, m * element_size, BACKWARD_BYTES)
    costs = {}
    for length in lengths:
        block = length * MULTIPLE
        gemms = 1 / efficiency(m, block, processors) + 1 / efficiency(tokens, block, processors)
        costs[length] = block * m * tokens * gemms + _BLOCK * processors
    return tuple(_cut(n, lengths[-1], costs))


@lru_cache(maxsize=64)
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
