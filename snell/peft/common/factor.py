"""One adapter's factor of one layer, as a leaf module, so that its parameter's name ends in ``.weight``.

PEFT's tools find parameters by such names: TRL copies those that hold ``.default.`` for its reference model, and the
wrap policy for FSDP1 takes leaf modules with a ``weight`` that is trained.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from snell.precision import keep_precision

__all__ = ["Factor"]


class Factor(nn.Module):
    """Holds ``weight``; called, gives it. A half-precision model keeps it in full."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """The weight. FSDP1 gathers it for this call alone, as a view of what it frees afterwards: then a copy."""
        weight = self.weight
        return weight if isinstance(weight, nn.Parameter) else weight.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factor:
        return super()._apply(lambda t: keep_precision(t, fn(t)), recurse)

    def extra_repr(self) -> str:
        """The weight's shape."""
        return " x ".join(map(str, self.weight.shape))
