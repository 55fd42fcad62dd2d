"""Selective freezing for transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from snell.training.cka import cka_importance
from snell.training.freezing import Importance, SelectiveFreezing
from snell.training.schedule import Schedule

__all__ = ["SafeCallback"]


class SafeCallback(TrainerCallback, ExportableState):
    """``Trainer(..., callbacks=[SafeCallback(share=0.5)])``: :class:`SelectiveFreezing` at regular checks.

    Checkpoints hold who is frozen, and a resumed run freezes the same adapters at its start. Training ends early if
    nothing is left to train.

    Args:
        calibration: the batch that importances are measured on, a mapping of tensors; the first ``samples`` of the
            training set unless given.
        samples: how many.
        every: steps between checks; below 1 a share of the training; or ``"epoch"``.
        importance, fold: as for :class:`SelectiveFreezing`.
        schedule: as for :class:`SelectiveFreezing`.

    Attributes:
        freezing: the run's :class:`SelectiveFreezing`, from the start of the training on.

    Raises:
        ValueError, TypeError: an argument out of its range, by name; and at the start of the training, a model or
            arguments of the Trainer that cannot be served.
    """

    def __init__(
        self,
        calibration: Any = None,
        *,
        samples: int = 32,
        every: float | str = 0.05,
        importance: Importance = cka_importance,
        fold: bool = True,
        **schedule: Any,
    ) -> None:
        number = isinstance(every, (int, float)) and not isinstance(every, bool)
        if every != "epoch" and not (number and every > 0 and (every < 1 or every == int(every))):  # type: ignore
            raise ValueError(f'every must be a whole number of steps, a share below 1, or "epoch"; got {every!r}')
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be an int of at least 1; got {samples!r}")
        for name, given in (("calibration", calibration), ("importance", importance)):
            if isinstance(given, str):
                raise TypeError(
                    f"{name} is not in a checkpoint: pass it to SafeCallback again, and leave "
                    "restore_callback_states_from_checkpoint off; who is frozen is restored without it"
                )
        Schedule(**schedule)
        self.calibration, self.samples, self.every = calibration, samples, every
        self.importance, self.fold, self.schedule = importance, fold, schedule
        self.freezing: SelectiveFreezing | None = None
        self.saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the arguments, and :meth:`SelectiveFreezing.state_dict`."""
        args = {"samples": self.samples, "every": self.every, "fold": self.fold, **self.schedule}
        args |= {"importance": "given"} if self.importance is not cka_importance else {}
        args |= {"calibration": "given"} if self.calibration is not None else {}
        return {"args": args, "attributes": {"saved": self.freezing and self.freezing.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure nothing yet, but freeze what the checkpoint says."""
        model = kwargs["model"]
        _check(args, model)
        batch = self.calibration
        if batch is None:
            batch = _first(kwargs["train_dataloader"], self.samples, args.seed)
        batch = {name: t.to(args.device) if isinstance(t, Tensor) else t for name, t in batch.items()}
        settings: dict[str, Any] = {"importance": self.importance, "fold": self.fold, **self.schedule}
        self.freezing = SelectiveFreezing(model, kwargs["optimizer"], batch, steps=state.max_steps, **settings)
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            # The Trainer keeps states by class, in a list where a class has several callbacks.
            saved = self.saved or (stored if isinstance(stored, dict) else stored[0])["attributes"]["saved"]
            if saved:
                self.freezing.load_state_dict(saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check, where the step is one to check at."""
        if self.every != "epoch":
            every = float(self.every)
            if state.global_step % (int(every) if every >= 1 else max(1, int(every * state.max_steps))) == 0:
                self._check(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check, where that is asked for."""
        if self.every == "epoch":
            self._check(state, control)

    def _check(self, state: Any, control: Any) -> None:
        assert self.freezing is not None
        self.freezing.check(state.global_step)
        control.should_training_stop |= self.freezing.done


def _first(dataloader: Any, samples: int, seed: int) -> Any:
    """The training set's first samples as a batch, the same in every process and in a resumed run."""
    dataset = dataloader.dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError("calibration must be given where the training set cannot be indexed")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return dataloader.collate_fn([dataset[i] for i in range(min(samples, len(dataset)))])


def _check(args: Any, model: Any) -> None:
    if getattr(args, "deepspeed", None):
        raise ValueError("SafeCallback does not work with DeepSpeed: its optimizer keeps state for all adapters in one")
    ddp = args.world_size > 1 and not args.fsdp
    given = args.ddp_find_unused_parameters
    if ddp and not (given or (given is None and not isinstance(model, PreTrainedModel))):
        raise ValueError(
            "ddp_find_unused_parameters must be True with SafeCallback: DistributedDataParallel otherwise waits for "
            "the gradients of frozen adapters"
        )
