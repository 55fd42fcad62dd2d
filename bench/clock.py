"""Time of steps that take turns, on a CPU or a GPU, and of single operations on a GPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Step = Callable[[], object]
Name = TypeVar("Name")

#: A method that takes more than this many times the median method's time is slow: it has fewer turns.
SLOW = 3

#: Turns of each method: at least, and at most. Below FIRST_LOOK seconds for all of them the least is one.
FEWEST, SLOW_FEWEST, MOST, FIRST_LOOK = 7, 3, 300, 5.0

#: Share of a case's time that each slow method may take.
SLOW_SHARE = 0.15

#: A GPU operation's sets of inputs together are this much larger than the L2 cache.
OVER_CACHE = 3


def seconds_of(step: Step, device: str) -> float:
    """One call's seconds: events on a GPU, the clock on a CPU."""
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def take_turns(
    steps: Mapping[Name, Step], device: str, turns: int | Mapping[Name, int], tick: Step = lambda: None
) -> dict[Name, list[float]]:
    """Seconds of each step's turns, in rounds, so that the machine's changes of speed affect all alike.

    A step with fewer turns than others sits the last rounds out. Every step has run before.
    """
    counts = turns if isinstance(turns, Mapping) else dict.fromkeys(steps, turns)
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    for turn in range(max(counts.values())):
        for name, step in steps.items():
            if turn < counts[name]:
                seconds[name].append(seconds_of(step, device))
        tick()
    return seconds


def slow(seconds: Mapping[Name, float]) -> set[Name]:
    """Which steps take so long that equal turns would be spent on them alone."""
    return {name for name, taken in seconds.items() if taken > SLOW * statistics.median(seconds.values())}


def turns_within(budget: float, seconds: float, fewest: int = FEWEST) -> int:
    """How often a round of ``seconds`` fits the budget; an odd number, so that a median is a measurement."""
    return min(max(int(budget / seconds), fewest), MOST) | 1


def fewest(budget: float, usual: int = FEWEST) -> int:
    """The fewest turns that a budget for all methods allows."""
    return usual if budget >= FIRST_LOOK else 1


def turns_of_each(budget: float, seconds: Mapping[Name, float]) -> dict[Name, int]:
    """How often each method runs, given the time it takes: most of them equally often, the slow ones less."""
    least = fewest(budget, SLOW_FEWEST)
    less = {name: turns_within(SLOW_SHARE * budget, seconds[name], least) for name in slow(seconds)}
    left = budget - sum(count * seconds[name] for name, count in less.items())
    others = sum(taken for name, taken in seconds.items() if name not in less)
    together = turns_within(left, others, fewest(budget))
    return {name: min(less.get(name, together), together) for name in seconds}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median ratio within a round, over the rounds that both were in: both sides saw the same machine."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=False))


def num_sets(bytes_each: int, device: str) -> int:
    """How many sets of inputs of that size exceed the L2 cache, so that none is found there by accident."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    return max(2, -(-OVER_CACHE * cache // bytes_each))


def median_seconds(steps: Sequence[Step], device: str, repetitions: int = 21) -> float:
    """The median time of one step, the steps taking turns; each runs once before."""
    for step in steps:
        step()
    turns = itertools.islice(itertools.cycle(steps), repetitions)
    return statistics.median(seconds_of(step, device) for step in turns)


def machine_rates(device: str) -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and FLOP/s of a large bf16 product, in this run."""
    size, n = (2**30, 8192) if device == "cuda" else (2**20, 128)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = median_seconds([lambda: target.copy_(source)], device)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"copy_bytes_per_s": 2 * size / copy, "gemm_flop_per_s": 2 * n**3 / median_seconds([lambda: a @ b], device)}
