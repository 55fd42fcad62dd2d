"""The settings of an update, checked once: kernel function, groups, gate, sparsity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from snell.kernel_functions import KERNEL_FUNCTIONS, KernelFunction

__all__ = ["DEFAULT_SCALES", "GATES", "Spec"]


#: ``none`` applies if ``sparsity == 0``: no competition, dW = K.
GATES = ("soft", "magnitude", "hard", "none")

#: The initial scale by the gate that applies. ``soft`` and ``magnitude`` multiply K by about its own size: the update
#: is of order scale^2 / in_features. At a scale of 3, LoRA's learning rates work (``snell bench gates``) and the update
#: starts small. With the other two gates dW is K itself, and a scale near 1 would change a fresh layer's weight a lot.
DEFAULT_SCALES = {"soft": 3.0, "magnitude": 3.0, "hard": 0.1, "none": 0.1}

#: The largest float32: the scale becomes a float32 parameter.
_LARGEST = (2 - 2**-23) * 2.0**127


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r} ({type(value).__name__})")
    return float(value)


@dataclass(frozen=True)
class Spec:
    """The rank, sparsity, kernel function, groups and gate of an update, checked on construction.

    Attributes:
        applied: the same, with the gate that applies: ``none`` if the sparsity is 0.

    Raises:
        ValueError: unknown ``kernel`` or ``gate``; ``sparsity`` NaN or outside [0, 1); ``rank`` not a multiple of
            ``groups``; ``rank`` or ``groups`` below 1.
        TypeError: an argument of the wrong type.
    """

    rank: int
    sparsity: float
    kernel: str = "piecewise_linear"
    groups: int = 2
    gate: str = "soft"
    applied: Spec = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _integer("rank", self.rank)
        _integer("groups", self.groups)
        sparsity = _number("sparsity", self.sparsity)
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity must lie in [0, 1), the share of entries that stay zero; got {sparsity}")
        object.__setattr__(self, "sparsity", sparsity)
        _choice("kernel", self.kernel, tuple(KERNEL_FUNCTIONS))
        _choice("gate", self.gate, GATES)
        if self.rank % self.groups:
            raise ValueError(
                f"rank must be a multiple of groups; got rank={self.rank}, groups={self.groups}: "
                f"use groups=1 or a rank of {self.rank - self.rank % self.groups + self.groups}"
            )
        competes = self.sparsity > 0 or self.gate == "none"
        object.__setattr__(self, "applied", self if competes else replace(self, gate="none"))

    @property
    def effective_gate(self) -> str:
        """The gate that applies: ``none`` if the sparsity is 0."""
        return self.applied.gate

    @property
    def function(self) -> KernelFunction:
        """The kernel function's row of the table."""
        return KERNEL_FUNCTIONS[self.kernel]

    @property
    def num_statistics(self) -> int:
        """Number of pair statistics that the kernel function takes."""
        return self.function.num_statistics(self.groups)

    def num_zeroed(self, entries: int) -> int:
        """How many of ``entries`` are set to 0: ceil(s * entries), in float64."""
        return math.ceil(self.sparsity * entries)

    @property
    def num_theta(self) -> int:
        """Number of scalar parameters of the kernel function."""
        return len(self.initial_theta(1.0))

    @property
    def default_scale(self) -> float:
        """The initial scale if none is given."""
        return DEFAULT_SCALES[self.effective_gate]

    def initial_theta(self, scale: float) -> list[float]:
        """The initial scalar parameters."""
        if not abs(_number("scale", scale)) <= _LARGEST:
            raise ValueError(f"scale must be finite in float32; got {scale}")
        return self.function.initial_theta(self.groups, float(scale))
