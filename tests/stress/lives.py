"""Two ways people train and save, each as a process that is killed at some moment and started again.

A life kills itself (SIGKILL) on the n-th line of Python that its saves execute, so that every state a save passes
through can be reached; or it waits after some saves for somebody else to kill it; or it lives to the end.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from snell.peft import SnellConfig, save_adapter
from tests.stress.tiny import tiny_llama, token_batches

#: A life that is to be killed saves at most this many times.
STEPS_A_LIFE = 4

SAVES: dict[str, Callable[[PeftModel, Path], None]] = {
    "save_adapter": save_adapter,
    "save_pretrained": lambda model, folder: model.save_pretrained(str(folder)),
}


class Fate:
    """Reports the saves of this process that are done, and ends it.

    Args:
        line: kill this process on that line of all its saves; 0: wait after a few saves to be killed; None: live.
        done: the file to report to.
    """

    def __init__(self, line: int | None, done: Path) -> None:
        self.line, self.done, self.lines, self.saves = line, done, 0, 0

    def __enter__(self) -> Fate:
        if self.line:
            sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, _frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.line:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._trace

    def report(self, step: int) -> None:
        """That the checkpoint of ``step`` is saved, and how many lines all saves took."""
        with self.done.open("a") as file:
            file.write(f"{step} {self.lines}\n")
        self.saves += 1
        if self.line == 0 and self.saves == STEPS_A_LIFE:
            signal.pause()


class SaveUnderFate(TrainerCallback):
    """Follows the Trainer's own saves; every step makes one."""

    def __init__(self, fate: Fate) -> None:
        self.fate = fate

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.fate.__enter__()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.fate.__exit__()
        self.fate.report(state.global_step)


class Samples(torch.utils.data.Dataset):
    """The batches of all steps, a sample at a time."""

    def __init__(self, steps: int) -> None:
        self.tokens = token_batches(steps, seed=1).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def _be_quiet() -> None:
    torch.set_num_threads(1)
    # transformers warns of a name that PEFT still uses.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


def fresh_model(dropout: float) -> PeftModel:
    """The model before its first step."""
    torch.manual_seed(2)
    return get_peft_model(tiny_llama(), SnellConfig(r=4, target_modules="all-linear", dropout=dropout))


def trainer_life(folder: Path, steps: int, line: int | None, done: Path, resume: str | None) -> None:
    """A Trainer that saves every step and keeps two checkpoints; dropout and AdamW have states to come back."""
    _be_quiet()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=steps,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    model, callbacks = fresh_model(dropout=0.1), [SaveUnderFate(Fate(line, done))]
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(steps), callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)


def plain_steps(model: PeftModel, first: int, steps: int, after_step: Callable[[int], None]) -> None:
    """Steps ``first + 1`` to ``steps`` of gradient descent, whose only state is the adapter."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batches = token_batches(steps, seed=1)
    model.train()
    for step in range(first, steps):
        model(input_ids=batches[step], labels=batches[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(step + 1)


def plain_life(folder: Path, steps: int, line: int | None, done: Path, first: int, save: str) -> None:
    """A loop that saves its adapter over the same folder after every step, and starts from it where there is one."""
    _be_quiet()
    fate = Fate(line, done)
    model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True) if first else fresh_model(dropout=0)

    def after_step(step: int) -> None:
        with fate:
            SAVES[save](model, folder)
        fate.report(step)

    plain_steps(model, first, steps, after_step)
