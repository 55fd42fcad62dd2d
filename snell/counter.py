"""Random numbers that a seed alone decides: not the device, the process, or the release of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["uniform"]


def uniform(count: int, seed: int, first: int = 0) -> Tensor:
    """``count`` float32 numbers in (-1, 1) on the CPU, from place ``first`` of the sequence of ``seed``; none is 0."""
    # The upper 24 bits, as an odd number between -2^24 and 2^24: exact in float32.
    bits = _splitmix64(count, seed, first) >> 39
    return (bits & 0x1FFFFFE).add_(1 - 2**24).float().div_(2**24)


def _splitmix64(count: int, seed: int, first: int) -> Tensor:
    """Numbers of SplitMix64, as int64, whose products wrap. PyTorch's generators may change with a release.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014).
    """
    z = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device="cpu")
    z.mul_(0x9E3779B97F4A7C15 - 2**64).add_(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift & 2 ** (64 - shift) - 1)).mul_(factor - 2**64)
    return z ^ (z >> 31 & 2**33 - 1)
