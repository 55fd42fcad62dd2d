"""Stops backward at the lowest layer that still trains, where something would carry it further down.

Autograd stops there by itself if no input wants a gradient. ``enable_input_require_grads``, which activation
checkpointing turns on, makes the embeddings' output want one; backward then runs through a frozen prefix for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["Calls", "Cut"]


class Calls:
    """In which order a forward pass entered and left the modules of a model, and whether gradients are wanted."""

    def __init__(self) -> None:
        self.entered: dict[nn.Module, int] = {}
        self.left: dict[nn.Module, int] = {}
        #: Whether a module's output wanted a gradient although the pass ran without: only a hook asks for that.
        self.wanted = False
        self._clock = 0

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Record the pass that runs within the context, under ``torch.no_grad``."""
        handles = []
        for module in _modules(model):
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._clock += 1
        self.entered.setdefault(module, self._clock)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        self._clock += 1
        self.left[module] = self._clock
        self.wanted |= isinstance(output, Tensor) and output.requires_grad

    def prefix(self, model: nn.Module) -> list[nn.Module]:
        """The largest modules that had been left for good before the first one that trains was entered, in order."""
        first = self._first_trained(model)
        found: list[nn.Module] = []

        def walk(module: nn.Module) -> None:
            if self.left.get(module, first) < first:
                found.append(module)
            elif not isinstance(module, BaseTunerLayer):
                for child in module.children():
                    walk(child)

        walk(model)
        return sorted(found, key=lambda module: self.entered[module])

    def _first_trained(self, model: nn.Module) -> float:
        """When the first module was entered that trains something; a module that is not called counts to its parent."""
        times: list[int] = []

        def walk(module: nn.Module, time: int) -> None:
            time, whole = self.entered.get(module, time), isinstance(module, BaseTunerLayer)
            times.extend(time for p in module.parameters(recurse=whole) if p.requires_grad)
            for child in () if whole else module.children():
                walk(child, time)

        walk(model, 0)
        return min(times, default=float("inf"))


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those in it. An adapted layer counts as one: hooks on its base layer would keep it from fusing."""
    yield module
    for child in () if isinstance(module, BaseTunerLayer) else module.children():
        yield from _modules(child)


class Cut:
    """What is switched so that backward does not enter a frozen prefix."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._wanted = False

    def move(self, calls: Calls, model: nn.Module) -> None:
        """Put the cut below the first module that trains now."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        prefix = calls.prefix(model)
        blocks = [
            module for module in prefix if any(isinstance(m, GradientCheckpointingLayer) for m in module.modules())
        ]
        reentrant = any(_is_reentrant(module) for module in model.modules())
        # Where the cut lies already, a pass sees nothing of what is wanted below it.
        self._wanted |= calls.wanted
        if not self._wanted or not (blocks if reentrant else prefix):
            return
        for module in prefix:
            without = _WithoutGrad()
            self._handles.append(module.register_forward_pre_hook(without.enter))
            # First of the hooks: where an earlier run has put a cut here, the modes are restored in reverse.
            self._handles.append(module.register_forward_hook(without.leave, always_call=True, prepend=True))
            if not reentrant:
                self._handles.append(module.register_forward_hook(_detach))
            for block in module.modules():
                if isinstance(block, GradientCheckpointingLayer):
                    block.gradient_checkpointing = False
        if reentrant:
            # Reentrant checkpointing gives gradients only where an input wants one.
            self._handles.append(blocks[-1].register_forward_hook(_want))


class _WithoutGrad:
    """Runs a module under ``torch.no_grad``."""

    def __init__(self) -> None:
        self._modes: list[bool] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self._modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._modes:
            torch.set_grad_enabled(self._modes.pop())


def _detach(module: nn.Module, args: Any, output: Any) -> Any:
    # A hook may have asked for a gradient of the output itself.
    return output.detach() if isinstance(output, Tensor) else output


def _is_reentrant(module: nn.Module) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if not isinstance(checkpoint, partial) or not getattr(module, "gradient_checkpointing", False):
        return False
    return checkpoint.keywords.get("use_reentrant") is not False


def _want(module: nn.Module, args: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if torch.is_grad_enabled() and isinstance(first, Tensor) and first.is_leaf:
        first.requires_grad_()
