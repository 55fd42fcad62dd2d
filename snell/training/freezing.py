"""SAFE, selective adapter freezing: adapters that change little stop training early, and stop costing.

Source: arXiv 2412.03587 (NAACL 2025). Its code is not public: what it leaves open is an argument here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from snell.training.adapters import adapters_of, outputs, parameters_of
from snell.training.cka import cka_importance
from snell.training.folding import Fold, can_fold
from snell.training.prefix import Calls, Cut
from snell.training.schedule import Schedule

__all__ = ["Importance", "SelectiveFreezing"]

#: Of a layer's output without the adapter and what the adapter adds, both [N, d]: how much the adapter matters.
Importance = Callable[[Tensor, Tensor], Tensor | float]

#: Rows of a layer's output that the importance is computed from, evenly spaced, if there are more.
ROWS = 512


class SelectiveFreezing:
    """Freezes the adapters of a PEFT model by and by, for training loops of one's own.

    ::

        freezing = SelectiveFreezing(model, optimizer, batch, steps=1000, share=0.5)
        for step in range(1, 1001):
            ...  # forward, backward, optimizer.step(), optimizer.zero_grad()
            if step % 50 == 0:
                freezing.check(step)

    An adapter is what a tuner adds to one layer. Frozen, it stays in the forward pass and never trains again. Its
    gradients and optimizer state are dropped at once, and its layer keeps no activation for it. Backward stops at the
    lowest layer that still trains, with activation checkpointing too; it then gives the model's inputs no gradients.

    In distributed training every process gives the same batch; the first process's importances decide for all.

    Args:
        model: with adapters of any PEFT tuner; wrapped by DistributedDataParallel with
            ``find_unused_parameters=True``, or by ``fully_shard``, or neither.
        optimizer: the one that trains it.
        batch: the calibration batch, on the model's device, the same at every check: a mapping is passed as keyword
            arguments, a tuple or list as positional ones. Where it holds an ``attention_mask``, padding does not count.
        steps: of the whole training; what ``warmup`` and ``end`` are shares of.
        importance: of an adapter, from its layer's output without it and what it adds, both ``[N, d]`` on the
            calibration batch; adapters of the least importance freeze first. N is at most 512.
        fold: whether a frozen adapter is merged into its weight, where that is a plain float matrix. The layer then
            costs what its base layer costs, without the adapter's dropout. To unfold bit for bit, SNELL keeps
            (1 - s) m n weights and other tuners a copy of the weight in the host's memory.
        schedule: ``threshold`` or ``share``, ``initial``, ``warmup``, ``end`` and ``tolerance``: see :class:`Schedule`.

    Attributes:
        frozen: by name of the layer, the ``step`` at which its adapter froze and its ``importance`` then.
        importances: the last measured importance of each adapter.

    Raises:
        ValueError, TypeError: a model without adapters that train, one wrapped in a way that cannot be served, or an
            argument out of its range, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        batch: Any,
        *,
        steps: int,
        importance: Importance = cka_importance,
        fold: bool = True,
        **schedule: Any,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an int of at least 1; got {steps!r}")
        if not callable(importance):
            raise TypeError(f"importance must be a function of two tensors [N, d]; got {importance!r}")
        if not hasattr(optimizer, "state"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
        self.model, self.optimizer, self.batch = _unwrapped(model), optimizer, batch
        self.steps, self.importance, self.fold = steps, importance, fold
        self.schedule = Schedule(**schedule)
        self.adapters = adapters_of(self.model)
        self.frozen: dict[str, dict[str, Any]] = {}
        self.importances: dict[str, float] = {}
        self.warmed_up: float | None = None
        self._folds: dict[str, Fold] = {}
        self._calls, self._cut = Calls(), Cut()

    @property
    def done(self) -> bool:
        """Whether nothing of the model trains any more."""
        return not any(p.requires_grad for p in self.model.parameters())

    @property
    def folded(self) -> list[str]:
        """Names of the layers whose weight holds their update at present."""
        return [name for name, fold in self._folds.items() if fold.holds]

    def check(self, step: int) -> list[str]:
        """Measure the importances and freeze what the schedule says; call it after the optimizer's step.

        Args:
            step: how many steps have been taken, from 1.

        Returns:
            Names of the layers whose adapters froze now.

        Raises:
            ValueError: an importance is not finite.
        """
        for name in self.frozen:  # set_adapter and others make them train again
            for p in parameters_of(self.adapters[name]):
                p.requires_grad_(False)
        left = len(self.adapters) - len(self.frozen)
        wanted = len(self.adapters) * self.schedule.final
        if not left or (self.schedule.kind == "share" and len(self.frozen) + 1 > wanted + 1e-9):
            return []
        before, now = self.importances, self.measure()
        self.importances = {**before, **now}
        progress = step / self.steps
        if self.warmed_up is None and progress >= self.schedule.warmup and self._steady(before, now):
            self.warmed_up = progress
        if self.warmed_up is None:
            return []
        level = self.schedule.level(progress, self.warmed_up)
        names = self.schedule.to_freeze(now, level, len(self.frozen), len(self.adapters))
        self._freeze({name: {"step": step, "importance": now[name]} for name in names})
        return names

    def measure(self) -> dict[str, float]:
        """The importance of each adapter that still trains and that the calibration batch reaches."""
        found: dict[str, list[Tensor]] = {}

        def measure_layer(name: str, layer: Any, args: Any, kwargs: Any) -> None:
            plain, change = outputs(layer, args[0] if args else next(iter(kwargs.values())))
            rows = _rows(plain, self.batch)
            value = self.importance(plain.flatten(0, -2)[rows], change.flatten(0, -2)[rows])
            found.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float64, device=plain.device))

        handles = []
        for name, layer in self.adapters.items():
            if name not in self.frozen:
                hook = lambda module, args, kwargs, name=name: measure_layer(name, module, args, kwargs)  # noqa: E731
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            self._pass()
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            return {}
        values = torch.stack([torch.stack(calls).mean() for calls in found.values()])
        if dist.is_initialized():
            dist.broadcast(values, src=0)
        importances = dict(zip(found, values.tolist(), strict=True))
        for name, value in importances.items():
            if not math.isfinite(value):
                raise ValueError(f"the importance of {name} is {value}: are the model's outputs finite?")
        return importances

    def unfold(self) -> None:
        """Give every folded weight its bits back. The adapters stay frozen, and run beside their weights again."""
        for fold in self._folds.values():
            fold.undo()
        self._folds.clear()

    def state_dict(self) -> dict[str, Any]:
        """Who is frozen since when, the importances and the end of the warm-up, as JSON can hold it."""
        return {"frozen": dict(self.frozen), "importances": dict(self.importances), "warmed_up": self.warmed_up}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Freeze what was frozen when :meth:`state_dict` was called. Load the adapters' weights before.

        Raises:
            ValueError: the state names a layer that the model has no adapter in.
        """
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, BaseTunerLayer)}
        if unknown := sorted(state["frozen"].keys() - layers.keys()):
            raise ValueError(f"state names layers that have no adapter in model, such as {unknown[0]}")
        # In the model's order, also where an earlier run of the same model has frozen some.
        known = self.adapters.keys() | state["frozen"].keys()
        self.adapters = {name: layer for name, layer in layers.items() if name in known}
        self.importances, self.warmed_up = dict(state["importances"]), state["warmed_up"]
        if state["frozen"]:
            self._pass()
        self._freeze({name: dict(facts) for name, facts in state["frozen"].items()})

    def _steady(self, before: dict[str, float], now: dict[str, float]) -> bool:
        tolerance = self.schedule.tolerance
        if tolerance is None:
            return True
        return bool(before) and all(abs(now[name] - before[name]) <= tolerance * before[name] for name in now)

    def _freeze(self, facts: dict[str, dict[str, Any]]) -> None:
        if not facts:
            return
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # the calibration pass has gathered parameters that no backward frees
                module.reshard()
        for name in facts:
            for p in parameters_of(self.adapters[name]):
                p.requires_grad_(False)
                p.grad = None
                self.optimizer.state.pop(p, None)
            if self.fold and can_fold(self.adapters[name], self.model):
                self._folds[name] = Fold(self.adapters[name])
        self.frozen.update(facts)
        self._cut.move(self._calls, self.model)

    @torch.no_grad()
    def _pass(self) -> None:
        """The calibration batch through the model as in evaluation, which leaves no trace."""
        self._calls = Calls()
        arguments = () if isinstance(self.batch, Mapping) else self.batch
        arguments = (arguments,) if isinstance(arguments, Tensor) else arguments
        with _evaluation(self.model), self._calls.recorded(self.model):
            self.model(*arguments, **(self.batch if isinstance(self.batch, Mapping) else {}))


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _rows(output: Tensor, batch: Any) -> Tensor:
    """Which rows of a layer's flattened output count: at most ROWS, evenly spaced, and no padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == output.shape[:-1]:
        rows = mask.flatten().nonzero().flatten()
    else:
        rows = torch.arange(output[..., 0].numel(), device=output.device)
    return rows[:: max(1, -(-len(rows) // ROWS))]


def _unwrapped(model: nn.Module) -> nn.Module:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "model is wrapped by FullyShardedDataParallel, which freezes no part of a flat parameter: use fully_shard"
        )
    if not isinstance(model, DistributedDataParallel):
        return getattr(model, "_orig_mod", model)
    if not model.find_unused_parameters or model.static_graph:
        raise ValueError(
            "model must be wrapped by DistributedDataParallel with find_unused_parameters=True and without "
            "static_graph: it waits for the gradients of frozen adapters otherwise"
        )
    return model.module
