"""Which entries survive while SNELL trains, and which gradients survivors and losers get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snell import functional

#: Steps between two looks at the gradients and at the way to the final survivors.
EVERY = 5


def _survivors(layer: Any) -> Tensor:
    """``[m, n]``: whether K's entry is kept. What an identity start subtracts does not count."""
    [parameters] = layer.snell_parameters()
    return functional.dense(functional.update(*parameters)) != 0


def _count(masks: list[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


class Watch:
    """A model with one SNELL adapter, looked at before each step.

    Attributes:
        replaced: for each step but the first, the share of the survivors that were losers a step before.
        looked: the steps at which the rest is known.
        gradients: ``survivors`` and ``losers``: the root mean square of the loss's gradient of the weights' entries.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if hasattr(module, "snell_parameters")]
        self._masks: list[Tensor] = []
        self._kept: list[list[Tensor]] = []
        self._sums = torch.zeros(2, dtype=torch.float64)
        self.replaced: list[float] = []
        self.looked: list[int] = []
        self.gradients: dict[str, list[float]] = {"survivors": [], "losers": []}

    @torch.no_grad()
    def look(self, step: int, last: bool) -> bool:
        """See who survives before ``step``. Returns whether the step's gradients are to be watched."""
        masks = [_survivors(layer) for layer in self._layers]
        if self._masks:
            new = sum(int((now & ~before).sum()) for now, before in zip(masks, self._masks, strict=True))
            self.replaced.append(new / _count(masks))
        self._masks = masks
        if step % EVERY and not last:
            return False
        self.looked.append(step)
        self._kept.append(masks)
        return True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watch the gradients of a forward and backward pass inside the context."""
        self._sums.zero_()
        hooks = [
            layer.register_forward_hook(lambda _layer, inputs, y, mask=mask: self._hear(inputs[0], y, mask))
            for layer, mask in zip(self._layers, self._masks, strict=True)
        ]
        yield
        for hook in hooks:
            hook.remove()
        counts = _count(self._masks), _count([~mask for mask in self._masks])
        for name, total, count in zip(self.gradients, self._sums.tolist(), counts, strict=True):
            self.gradients[name].append((total / max(count, 1)) ** 0.5)

    def _hear(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        x = x.detach().flatten(0, -2)

        def add(grad: Tensor) -> None:
            squares = (grad.flatten(0, -2).t() @ x).square()
            kept = squares[mask].sum()
            self._sums.add_(torch.stack([kept, squares.sum() - kept]))

        y.register_hook(add)

    def final(self) -> list[float]:
        """At each of the ``looked`` steps, the share of the last look's survivors that already survived."""
        last = self._kept[-1]
        both = ([now & then for now, then in zip(masks, last, strict=True)] for masks in self._kept)
        return [_count(masks) / _count(last) for masks in both]
