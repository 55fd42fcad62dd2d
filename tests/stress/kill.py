"""Trainings that are killed (SIGKILL) again and again, resumed each time, and compared with one that is not."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from snell.peft import last_checkpoint
from tests.stress.lives import STEPS_A_LIFE, fresh_model, plain_life, plain_steps, trainer_life
from tests.stress.tiny import tiny_llama

#: No life of a few steps takes longer, on any machine.
PATIENCE_S = 120

Factors = dict[str, Tensor]


@dataclass
class Outcome:
    """What kills did to one way of saving and resuming.

    Attributes:
        way: that way.  steps: of the training.  kills: how many it suffered.
        amid_a_save: kills that left a save visibly undone; None: where undone and done look the same.
        problems: what failed, and ended the trial.
    """

    way: str
    steps: int
    kills: int = 0
    amid_a_save: int | None = 0
    problems: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """A row of a table."""
        amid = "-" if self.amid_a_save is None else str(self.amid_a_save)
        end = "; ".join(self.problems) or f"step {self.steps:,} reached, bits equal to the unbroken run's"
        return [self.way, str(self.kills), amid, end]


class Executioner:
    """Starts lives and ends them: by turns on a random line of a save, and at a random moment from outside."""

    def __init__(self, life: Callable[..., None], done: Path, seed: int) -> None:
        # Processes fork from one that has imported everything and computed nothing.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.stress.lives"])
        self.life, self.done, self.random = life, done, random.Random(seed)
        self.lines_a_save = 0

    def live(self, folder: Path, steps: int, *arguments: object, line: int | None = None) -> int:
        """A life that nobody ends; its exit code."""
        process = self._start(folder, steps, line, arguments)
        process.join(PATIENCE_S)
        return self._exit_code(process)

    def measure(self, folder: Path, *arguments: object) -> None:
        """How many lines a save executes, but for the first, which imports what it needs."""
        if self.live(folder, 2, *arguments, line=sys.maxsize):
            raise RuntimeError("a training that nobody killed failed")
        (_, first), (_, both) = self._reports()
        self.lines_a_save = both - first
        self.done.unlink()

    def kill_one(self, on_line: bool, folder: Path, steps: int, *arguments: object) -> int:
        """A life, and its end; the exit code."""
        if on_line:
            line = self.random.randint(1, (STEPS_A_LIFE - 1) * self.lines_a_save)
            return self.live(folder, steps, *arguments, line=line)
        process = self._start(folder, steps, 0, arguments)
        before, times = len(self._reports()), []
        while len(times) < 2 and process.is_alive():
            if len(self._reports()) > before + len(times):
                times.append(time.perf_counter())
            time.sleep(1e-3)
        if len(times) == 2:
            time.sleep(self.random.uniform(0, times[1] - times[0]))
        process.kill()
        return self._exit_code(process)

    def saved(self) -> int:
        """The newest step whose save was done."""
        return max((step for step, _ in self._reports()), default=0)

    def _start(self, folder: Path, steps: int, line: int | None, arguments: tuple[object, ...]) -> Any:
        process = self.context.Process(target=self.life, args=(folder, steps, line, self.done, *arguments))
        process.start()
        return process

    def _exit_code(self, process: Any) -> int:
        if process.is_alive():
            process.join(PATIENCE_S)
        code = process.exitcode
        process.close()
        return code

    def _reports(self) -> list[tuple[int, int]]:
        lines = self.done.read_text().splitlines() if self.done.exists() else []
        return [(int(step), int(count)) for step, count in (line.split() for line in lines)]


def newest_folder(folder: Path) -> str | None:
    """The checkpoint that ``resume_from_checkpoint=True`` takes."""
    return get_last_checkpoint(folder) if folder.exists() else None


def kill_trainer(
    folder: Path, kills: int, seed: int = 0, resume: Callable[[Path], str | None] = last_checkpoint
) -> Outcome:
    """Kill a Trainer that saves every step, resuming from what ``resume`` finds; its end beside an unbroken run's.

    Stops at the first problem: a run that does not resume, a save that was done and is lost, or factors that differ.
    """
    how = "last_checkpoint" if resume is last_checkpoint else "resume_from_checkpoint=True"
    outcome = Outcome(f"Trainer, {how}", STEPS_A_LIFE * kills + 1)
    folder.mkdir(parents=True, exist_ok=True)
    executioner = Executioner(trainer_life, folder / "done", seed)
    executioner.measure(folder / "measured", None)
    broken = folder / "broken"
    for _ in _lives(outcome, kills, executioner, lambda: (broken, outcome.steps, resume(broken))):
        whole = last_checkpoint(broken)
        outcome.amid_a_save = (outcome.amid_a_save or 0) + (newest_folder(broken) != whole)
        step = int(whole.rpartition("-")[2]) if whole else 0
        if step < executioner.saved():
            outcome.problems.append(f"the checkpoint of step {executioner.saved()} was saved and is lost")
    if not outcome.problems and executioner.live(broken, outcome.steps, resume(broken)):
        outcome.problems.append("the run does not resume")
    if not outcome.problems:
        executioner.live(folder / "unbroken", outcome.steps, None)
        ends = [
            load_file(folder / run / f"checkpoint-{outcome.steps}" / "adapter_model.safetensors")
            for run in ("broken", "unbroken")
        ]
        if not _equal(*ends):
            outcome.problems.append("the resumed run's factors differ from the unbroken run's")
    return outcome


def kill_plain(folder: Path, kills: int, seed: int = 0, save: str = "save_adapter") -> Outcome:
    """Kill a loop that saves its adapter over one folder; each time what stands there must be of the unbroken run.

    Stops at the first problem: an adapter that does not load, or is neither the last one saved nor the one after.
    """
    outcome = Outcome(save, STEPS_A_LIFE * kills + 1, amid_a_save=0 if save == "save_adapter" else None)
    folder.mkdir(parents=True, exist_ok=True)
    executioner = Executioner(plain_life, folder / "done", seed)
    executioner.measure(folder / "measured", 0, save)
    unbroken: list[Factors] = []
    model = fresh_model(dropout=0)
    unbroken.append(_factors(model))
    plain_steps(model, 0, outcome.steps, lambda _: unbroken.append(_factors(model)))
    broken = folder / "broken"
    step = 0

    def arguments() -> tuple[object, ...]:
        return broken, outcome.steps, step, save

    for _ in _lives(outcome, kills, executioner, arguments):
        if save == "save_adapter":
            outcome.amid_a_save = (outcome.amid_a_save or 0) + (folder / "broken" / ".saving").exists()
        step = _step_of(broken, unbroken, executioner.saved(), outcome)
    if not outcome.problems and executioner.live(broken, outcome.steps, step, save):
        outcome.problems.append("the run does not resume")
    if not outcome.problems:
        _step_of(broken, unbroken, outcome.steps, outcome)
    return outcome


def _lives(
    outcome: Outcome, kills: int, executioner: Executioner, arguments: Callable[[], tuple[Any, ...]]
) -> Iterator[None]:
    """Kill life after life, until as many were killed as asked for or there is a problem."""
    for i in range(kills):
        code = executioner.kill_one(i % 2 == 0, *arguments())
        if code != -signal.SIGKILL:
            outcome.problems.append(f"the run does not resume: it ended by itself, with exit code {code}")
            return
        outcome.kills += 1
        yield
        if outcome.problems:
            return


def _step_of(folder: Path, unbroken: list[Factors], saved: int, outcome: Outcome) -> int:
    """Which step of the unbroken run the adapter in ``folder`` is of."""
    if not saved and not (folder / "adapter_model.safetensors").exists():
        return 0
    try:
        factors = _factors(PeftModel.from_pretrained(tiny_llama(), folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        outcome.problems.append(f"the adapter does not load: {type(error).__name__}: {error}")
        return 0
    for step in (saved, saved + 1):
        if step < len(unbroken) and _equal(factors, unbroken[step]):
            return step
    outcome.problems.append(f"the adapter is not the unbroken run's of step {saved} or {saved + 1}")
    return 0


def _factors(model: PeftModel) -> Factors:
    return {key: value.clone() for key, value in model.state_dict().items() if "snell_" in key}


def _equal(ours: Factors, theirs: Factors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
