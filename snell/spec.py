"""What an update is made of, validated once: kernel function, groups, gate, sparsity.

The mathematics of each name stands in :mod:`snell.reference`; here are only the facts that every
floor above and below needs: how many scalar parameters a kernel function has, where they start,
and which pair statistic it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["GATES", "KERNEL_FUNCTIONS", "KernelFunction", "Spec", "num_zeroed"]


@dataclass(frozen=True)
class KernelFunction:
    """A scalar function of pair statistics.

    Attributes:
        statistic: ``"dot"`` (``b . a``) or ``"distance"`` (``norm2(b - a)``).
        grouped: whether the statistic is taken per group of the rank axis, or once over the whole of it.
        trains_theta: whether the scalar parameters are trained unless the user says otherwise.
        initial_theta: ``(groups, scale) -> `` the starting values of the scalar parameters.
    """

    statistic: str
    grouped: bool
    trains_theta: bool
    initial_theta: Callable[[int, float], list[float]]


KERNEL_FUNCTIONS: dict[str, KernelFunction] = {
    "piecewise_linear": KernelFunction(
        "distance", True, False, lambda groups, scale: [scale * (-1.0) ** p for p in range(groups)]
    ),
    "linear": KernelFunction("dot", False, False, lambda groups, scale: []),
    # alpha, beta, gamma; gamma makes kappa(0, 0) = 0.
    "sigmoid": KernelFunction("dot", False, True, lambda groups, scale: [scale, 1.0, -scale / 2]),
    "rbf": KernelFunction("distance", False, True, lambda groups, scale: [scale, 1.0, -scale]),
}

#: ``none`` is what ``sparsity == 0`` means: no competition, dW = K.
GATES = ("soft", "magnitude", "hard", "none")

#: The kernel function's scale at the start, by the gate that applies. The first two multiply by \|K\| once more, so
#: that the update is of the order of scale^2 / in_features: 3 brings LoRA's learning rates into reach
#: (``snell bench gates``) and still starts small. Where dW is K itself, anything near 1 would start by changing a layer
#: by a good part of its weight, whatever its width.
DEFAULT_SCALES = {"soft": 3.0, "magnitude": 3.0, "hard": 0.1, "none": 0.1}


def num_zeroed(sparsity: float, entries: int) -> int:
    """How many of ``entries`` the competition sets to zero: ceil(s * entries), in float64."""
    return math.ceil(sparsity * entries)


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

    @property
    def effective_gate(self) -> str:
        """The gate that applies: without sparsity nothing competes."""
        return "none" if self.sparsity == 0.0 else self.gate

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
        if not math.isfinite(_number("scale", scale)):
            raise ValueError(f"scale must be finite; got {scale}")
        return KERNEL_FUNCTIONS[self.kernel].initial_theta(self.groups, float(scale))
