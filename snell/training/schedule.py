"""When how much may freeze: a warm-up in which nothing does, then a cubic rise, then the final level."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The numbers of selective freezing. Each is an argument: the method's own code is not public.

    Args:
        threshold: the importance, in [0, 1], up to which an adapter freezes at the end.
        share: instead of it, the share of all adapters, in [0, 1], that is frozen at the end, the least important ones
            first. Half of them, if neither is given. A share means the same for every model; a threshold does not.
        initial: the threshold, or the share, that the rise begins with.
        warmup: share of the training in which nothing freezes.
        end: share of the training at which the final level is reached.
        tolerance: if given, the warm-up also lasts until no importance moved by more than this share of itself between
            two checks.

    Raises:
        ValueError: a number outside [0, 1], ``warmup`` after ``end``, ``initial`` above the final level, or both
            ``threshold`` and ``share``.
    """

    threshold: float | None = None
    share: float | None = None
    initial: float = 0.0
    warmup: float = 0.1
    end: float = 0.5
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in ("threshold", "share", "initial", "warmup", "end", "tolerance"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= 1):
                raise ValueError(f"{name} must be a number in [0, 1]; got {value!r}")
        if self.threshold is not None and self.share is not None:
            raise ValueError(f"give threshold or share, not both; got {self.threshold} and {self.share}")
        if self.threshold is None and self.share is None:
            object.__setattr__(self, "share", 0.5)
        if self.warmup > self.end:
            raise ValueError(f"warmup must not be after end; got {self.warmup} and {self.end}")
        if self.initial > self.final:
            raise ValueError(f"initial must be at most the final {self.kind}, {self.final}; got {self.initial}")

    @property
    def kind(self) -> str:
        """``threshold`` or ``share``."""
        return "share" if self.threshold is None else "threshold"

    @property
    def final(self) -> float:
        """The threshold or share at the end."""
        found = self.share if self.threshold is None else self.threshold
        assert found is not None
        return found

    def level(self, progress: float, warmed_up: float) -> float:
        """The threshold or share at ``progress`` of the training, if the warm-up was over at ``warmed_up``.

        ``final + (initial - final) (1 - t)^3`` with t from 0 at ``warmed_up`` to 1 at ``end``; never falls.
        """
        if progress >= self.end:
            return self.final
        left = 1 - (progress - warmed_up) / (self.end - warmed_up)
        return self.final + (self.initial - self.final) * min(1.0, left) ** 3

    def to_freeze(self, importances: dict[str, float], level: float, already: int, number: int) -> list[str]:
        """Which adapters freeze at that level.

        Args:
            importances: of adapters that still train.
            level: from :meth:`level`.
            already, number: how many adapters are frozen, and how many there are.
        """
        by_importance = sorted(importances, key=lambda name: importances[name])
        if self.kind == "threshold":
            return [name for name in by_importance if level > 0 and importances[name] <= level]
        # A product such as 0.7 * 10 may fall short of the count that is meant.
        return by_importance[: max(0, math.floor(level * number + 1e-9) - already)]
