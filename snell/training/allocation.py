"""How many entries each layer keeps: a total that falls over the training, divided by the layers' scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BudgetSchedule", "water_fill"]


@dataclass(frozen=True)
class BudgetSchedule:
    """The share of zeros over all layers, from ``initial`` to ``final`` along a cubic.

    Steps may be optimizer steps or epochs; the published runs count epochs.

    Args:
        initial: sparsity at the start.  final: sparsity at the end; it may be above or below.
        total: steps of the training.
        warmup: steps at the start without allocation.  cooldown: steps at the end that keep the final total.
        interval: steps between allocations in between.

    Raises:
        ValueError: a sparsity outside [0, 1), steps that are no counts, or no step between warm-up and cool-down.

    Source: arXiv 2510.24037 and its code.
    """

    initial: float
    final: float
    total: int
    warmup: int = 0
    cooldown: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a sparsity in [0, 1); got {value!r}")
        for name, least in (("total", 1), ("warmup", 0), ("cooldown", 0), ("interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}; got {value!r}")
        if self.warmup + self.cooldown >= self.total:
            raise ValueError(
                f"warmup and cooldown must leave a step of the {self.total}; got {self.warmup} and {self.cooldown}"
            )

    def allocates(self, step: int) -> bool:
        """Whether the total is divided anew at this step."""
        return step > self.warmup and (step > self.total - self.cooldown or step % self.interval == 0)

    def kept(self, step: int, entries: int) -> int:
        """How many of ``entries`` all layers together keep at this step."""
        first, last = (entries - math.ceil(sparsity * entries) for sparsity in (self.initial, self.final))
        if step <= self.warmup:
            return first
        left = 1 - (step - self.warmup) / (self.total - self.cooldown - self.warmup)
        return last if left <= 0 else last + math.trunc((first - last) * left**3)


def water_fill(total: int, scores: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Divide ``total`` entries in proportion to the scores, no layer above its size; the sum is ``total`` to the entry.

    What full layers cannot take goes to the others. Without any score, layers share by size. Layers of equal size keep
    more for a higher score.

    Args:
        total: from 0 to the sum of sizes.
        scores: not negative, finite.

    Raises:
        ValueError: a total out of range, or scores that are negative or not finite.
    """
    if not 0 <= total <= sum(sizes):
        raise ValueError(f"total must lie in [0, {sum(sizes)}], the number of entries; got {total}")
    if wrong := [score for score in scores if not (math.isfinite(score) and score >= 0)]:
        raise ValueError(f"scores must be finite and not negative; got {wrong[0]}")
    # Layers without a score take part once all others are full.
    filled, order = [0] * len(sizes), range(len(sizes))
    for group in ([i for i in order if scores[i] > 0], [i for i in order if scores[i] == 0]):
        weights = {i: scores[i] or float(sizes[i]) for i in group}
        for i, entries in _fill(min(total - sum(filled), sum(sizes[i] for i in group)), weights, sizes).items():
            filled[i] = entries
    return filled


def _fill(total: int, weights: dict[int, float], sizes: Sequence[int]) -> dict[int, int]:
    """``total`` is at most the sizes' sum, and all weights are above 0."""
    filled: dict[int, int] = {}
    by_fullness = sorted(weights, key=lambda i: sizes[i] / weights[i])
    rest = math.fsum(weights.values())
    left = total
    # The layer that fills first is full, as long as its share of what is left is at least its size.
    while by_fullness and left * weights[by_fullness[0]] >= sizes[by_fullness[0]] * rest:
        first = by_fullness.pop(0)
        filled[first] = min(sizes[first], left)
        left -= filled[first]
        rest = math.fsum(weights[i] for i in by_fullness)
    shares = {i: left * weights[i] / rest for i in by_fullness}
    floors = {i: min(math.floor(share), sizes[i]) for i, share in shares.items()}
    # By largest fraction; rounding may leave a floor one too high or too low, which more rounds make good.
    missing = left - sum(floors.values())
    by_fraction = sorted(by_fullness, key=lambda i: (floors[i] - shares[i], i))
    while missing:
        step = 1 if missing > 0 else -1
        for i in by_fraction if step > 0 else reversed(by_fraction):
            if missing and 0 <= floors[i] + step <= sizes[i]:
                floors[i] += step
                missing -= step
    return filled | floors
