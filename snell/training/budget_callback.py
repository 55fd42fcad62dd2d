"""Budgets of kept entries for transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from snell.training.allocation import BudgetSchedule
from snell.training.budget import SparsityBudget

__all__ = ["BudgetCallback"]


class BudgetCallback(TrainerCallback):
    """``Trainer(..., callbacks=[BudgetCallback(0.5, 0.9)])``: a :class:`SparsityBudget` over the training.

    Checkpoints hold its state, and a run that resumes from a checkpoint in ``output_dir`` goes on with it.

    Args:
        initial, final, warmup, cooldown, interval: as for :class:`BudgetSchedule`, whose total is the training's.
            Without ``final``, the adapter's ``sparsity``.
        every: what its steps are: ``"step"`` (the optimizer's) or ``"epoch"``. Gradients count at every step.
        settings: ``importance``, ``beta1``, ``beta2`` and ``adapter_name`` of :class:`SparsityBudget`.

    Attributes:
        budget: the run's :class:`SparsityBudget`, from the start of the training on.

    Raises:
        ValueError, TypeError: an argument out of its range, by name; some of them at the start of the training.
    """

    def __init__(
        self,
        initial: float,
        final: float | None = None,
        *,
        warmup: int = 0,
        cooldown: int = 0,
        interval: int = 1,
        every: str = "step",
        **settings: Any,
    ) -> None:
        if every not in ("step", "epoch"):
            raise ValueError(f"every must be step or epoch; got {every!r}")
        self.schedule = {"warmup": warmup, "cooldown": cooldown, "interval": interval}
        BudgetSchedule(initial, initial if final is None else final, warmup + cooldown + 1, **self.schedule)
        self.ends, self.every, self.settings = (initial, final), every, settings
        self.budget: SparsityBudget | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the first sparsities, or those of the checkpoint."""
        total = state.max_steps if self.every == "step" else -(-state.num_train_epochs // 1)
        initial, final = self.ends
        if final is None:
            final = kwargs["model"].peft_config[self.settings.get("adapter_name", "default")].sparsity
        schedule = BudgetSchedule(initial, final, int(total), **self.schedule)
        self.budget = SparsityBudget(kwargs["model"], schedule, **self.settings)
        if state.global_step:
            path = _path(args, state)
            if not path.exists():
                raise ValueError(f"the checkpoint has no {path}: it was not saved with BudgetCallback in output_dir")
            self.budget.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, before gradients are cleared."""
        assert self.budget is not None
        self.budget.update()
        if self.every == "step":
            self.budget.allocate(state.global_step + 1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Allocate, where that is done once an epoch."""
        if self.every == "epoch":
            assert self.budget is not None
            self.budget.allocate(round(state.epoch))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add this process's state to the checkpoint."""
        assert self.budget is not None
        torch.save(self.budget.state_dict(), _path(args, state))


def _path(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"sparsity_budget_{args.process_index}.pt"
