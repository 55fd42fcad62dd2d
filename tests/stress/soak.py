"""Training with random events between its steps and without, and what the process holds meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from tqdm import tqdm

from snell.bench.memory import status_kib
from snell.competition import memo
from snell.peft import SnellConfig
from tests.stress.events import Turmoil, bits, check
from tests.stress.tiny import tiny_llama, token_batches

#: The adapters that are trained by turns, unlike each other in all that settings can say.
TRAINED = {
    "default": SnellConfig(r=4, target_modules="all-linear", init_weights=False),
    "second": SnellConfig(
        r=6, sparsity=0.5, kernel="sigmoid", gate="magnitude", target_modules="all-linear", init_weights=False
    ),
}

#: Stops at which the model is as it began and what the process holds is counted, and steps between two at least.
STOPS = 20
APART = 25

#: Share of the run after which memory must be flat: allocators fill their pools first.
WARM_UP = 0.25

#: Growth of the resident set that counts as flat, from the first quarter after the warm-up to the last.
FLAT_MIB = 8.0
FLAT_KIB_A_STEP = 1.0

#: Called after each training step of the soaked run; what tests spoil it with.
Spoil = Callable[[PeftModel, int], None]


@dataclass
class Soak:
    """What a soaked run showed.

    Attributes:
        events: before which steps each event happened, by its name.
        resident_kib: the resident set after each step.
        live: at each stop, how many tensors Python holds, and their bytes.
        difference: largest absolute difference of a trained tensor from the quiet runs'; 0: bit for bit.
        base_difference: that of a base weight from what it was at the start.
    """

    steps: int
    events: dict[str, list[int]] = field(default_factory=dict)
    resident_kib: list[int] = field(default_factory=list)
    live: list[tuple[int, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    difference: float = float("nan")
    base_difference: float = float("nan")

    def warm(self) -> list[tuple[int, int]]:
        """Live tensors at the stops after the warm-up."""
        return self.live[int(WARM_UP * len(self.live)) :]

    def growth_mib(self) -> float:
        """Growth of the resident set after the warm-up: median of its last quarter less that of its first."""
        after = torch.tensor(self.resident_kib[int(WARM_UP * self.steps) :], dtype=torch.float64)
        quarter = len(after) // 4
        return ((after[-quarter:].median() - after[:quarter].median()) / 1024).item()

    def kib_a_step(self) -> float:
        """That growth by step: the medians lie three quarters of what follows the warm-up apart."""
        return self.growth_mib() * 1024 / (0.75 * (1 - WARM_UP) * self.steps)

    def problems(self) -> list[str]:
        """The properties that do not hold."""
        found = []
        if self.difference != 0:
            found.append(f"trained factors differ from the quiet runs' by up to {self.difference:.3g}")
        if self.base_difference != 0:
            found.append(f"base weights differ from those at the start by up to {self.base_difference:.3g}")
        if len(set(self.warm())) != 1:
            (first, first_bytes), (last, last_bytes) = self.warm()[0], self.warm()[-1]
            found.append(f"live tensors went from {first} ({first_bytes} bytes) to {last} ({last_bytes} bytes)")
        # In a short run the slope is that of the allocator's pools.
        rising = self.steps >= 1000 and self.kib_a_step() > FLAT_KIB_A_STEP
        if self.growth_mib() > FLAT_MIB or rising:
            found.append(
                f"the resident set grew by {self.growth_mib():.1f} MiB, {self.kib_a_step():.2f} KiB a step; flat is "
                f"{FLAT_MIB:g} MiB and {FLAT_KIB_A_STEP:g} KiB a step"
            )
        return found


def _adapted(*names: str) -> PeftModel:
    """The model with those adapters; each starts the same in whatever company."""
    model = None
    for name in names:
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            if model is None:
                model = get_peft_model(tiny_llama(), TRAINED[name], adapter_name=name)
            else:
                model.add_adapter(name, TRAINED[name])
    assert model is not None
    return model.train()


def _optimizer(model: PeftModel, name: str) -> torch.optim.Optimizer:
    own = [p for key, p in model.named_parameters() if key.endswith(f".{name}.weight")]
    return torch.optim.AdamW(own, lr=1e-3)


def _step(model: PeftModel, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _turns(steps: int, seed: int) -> list[str]:
    """Which adapter each step trains."""
    drawn = torch.randint(len(TRAINED), (steps,), generator=torch.Generator().manual_seed(seed))
    return [list(TRAINED)[i] for i in drawn.tolist()]


def quiet(name: str, steps: int, seed: int) -> dict[str, Tensor]:
    """The adapter's tensors after its steps, alone in a model to which nothing else happens."""
    model = _adapted(name)
    optimizer = _optimizer(model, name)
    batches = token_batches(steps, seed)
    own = [step for step, turn in enumerate(_turns(steps, seed)) if turn == name]
    for step in tqdm(own, desc=f"quiet, {name}"):
        _step(model, optimizer, batches[step])
    return bits(model, name)


def soak(steps: int, folder: Path, seed: int = 0, spoil: Spoil | None = None) -> Soak:
    """Train by turns with random events between steps, and compare with quiet runs.

    Args:
        steps: training steps in all.
        folder: for the saves among the events.
        seed: of data, turns and events.
        spoil: called after each step, to see that damage is found.

    Raises:
        Violation: an event changed what it must not, or a loss is not finite.
    """
    alone = {name: quiet(name, steps, seed) for name in TRAINED}
    model = _adapted(*TRAINED)
    optimizers = {name: _optimizer(model, name) for name in TRAINED}
    base = {key: value.clone() for key, value in model.state_dict().items() if "snell_" not in key}
    turmoil, result = Turmoil(model, folder, seed), Soak(steps)
    # Thresholds are kept by what the factors hold, as many as there is room for: fill it, so that it cannot grow.
    for i in range(memo.CAPACITY):
        memo.remember(("soak", i), lambda: torch.zeros(()))
    batches, apart = token_batches(steps, seed), max(APART, steps // STOPS)
    for step, name in enumerate(tqdm(_turns(steps, seed), desc="soak")):
        for _ in range(turmoil.random.choice((0, 0, 1, 2, 3))):
            result.events.setdefault(turmoil.happen(), []).append(step)
        turmoil.rest(name)
        loss = _step(model, optimizers[name], batches[step])
        check(loss == loss and abs(loss) != float("inf"), f"the loss of step {step} is {loss}")
        result.losses.append(loss)
        if spoil is not None:
            spoil(model, step)
        if step % apart == apart - 1:
            turmoil.rest()
            result.live.append(_live_tensors())
        result.resident_kib.append(status_kib("VmRSS"))
    turmoil.rest()
    trained = [bits(model, name) for name in TRAINED]
    result.difference = _difference(_merged(trained), _merged(alone.values()))
    result.base_difference = _difference({k: v for k, v in model.state_dict().items() if "snell_" not in k}, base)
    return result


def _merged(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: value for part in parts for key, value in part.items()}


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    check(ours.keys() == theirs.keys(), "tensors are missing at the end")
    # By torch's maximum, which a NaN does not slip through.
    return torch.stack([(ours[key] - theirs[key]).abs().max().double() for key in ours]).max().item()


def _live_tensors() -> tuple[int, int]:
    """How many tensors Python holds, and their bytes."""
    gc.collect()
    # Some objects that pretend to be of another class fail when asked. The compiler's fake tensors hold no memory,
    # and their sizes may be symbols.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
    return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)
