"""What an update is made of, validated once: kernel function, groups, gate, sparsity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from snell.kernel_functions import KERNEL_FUNCTIONS, KernelFunction

__all__ = ["DEFAULT_SCALES", "GATES", "Spec"]


#: ``none`` is what ``sparsity == 0`` means: no competition, dW = K.
GATES = ("soft", "magnitude", "hard", "none")

#: The kernel function's scale at the start, by the gate that applies. The first two gates multiply by \|K\| once more,
#: so the update is of order scale^2 / in_features: at 3, LoRA's learning rates work (``snell bench gates``) and the
#: update still starts small. Where dW is K itself, a scale near 1 would change a fresh layer by much of its weight.
DEFAULT_SCALES = {"soft": 3.0, "magnitude": 3.0, "hard": 0.1, "none": 0.1}

#: Of float32: the scale becomes a parameter of that dtype.
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
    """One update's kernel function, gate, groups and sparsity, checked on construction.

    Attributes:
        applied: the same, with the gate that applies: ``none`` where sparsity is 0.

    Raises:
        ValueError: unknown ``kernel`` or ``gate``, ``sparsity`` outside [0, 1) or NaN, ``rank`` no
            multiple of ``groups``, a dimension below 1.
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
        """The gate that applies: without sparsity nothing competes."""
        return self.applied.gate

    @property
    def function(self) -> KernelFunction:
        """The kernel function's row of the table."""
        return KERNEL_FUNCTIONS[self.kernel]

    @property
    def num_statistics(self) -> int:
        """How many pair statistics the kernel function reads."""
        return self.function.num_statistics(self.groups)

    def num_zeroed(self, entries: int) -> int:
        """How many of ``entries`` the competition sets to zero: ceil(s * entries), in float64."""
        return math.ceil(self.sparsity * entries)

    @property
    def num_theta(self) -> int:
        """How many scalar parameters the kernel function has."""
        return len(self.initial_theta(1.0))

    @property
    def default_scale(self) -> float:
        """The kernel function's scale at the start, where none is given."""
        return DEFAULT_SCALES[self.effective_gate]

    def initial_theta(self, scale: float) -> list[float]:
        """The scalar parameters at the start of training."""
        if not abs(_number("scale", scale)) <= _LARGEST:
            raise ValueError(f"scale must be finite in float32; got {scale}")
        return self.function.initial_theta(self.groups, float(scale))
