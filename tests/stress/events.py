"""What may happen to an adapted model between two training steps, and what must hold while it does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from snell.peft import SnellConfig, save_adapter
from tests.stress.tiny import token_batches

#: Adapters that come and go beside those that are trained, at most.
GUESTS = 3

SETTINGS = {
    "kernel": ("piecewise_linear", "linear", "sigmoid", "rbf"),
    "gate": ("soft", "magnitude", "hard"),
    "r": (2, 4, 8),
    "sparsity": (0.0, 0.5, 0.9, 0.99),
}


class Violation(AssertionError):
    """A property that must hold between training steps does not."""


def check(holds: bool, otherwise: str) -> None:
    """Raise a :class:`Violation` unless it holds."""
    if not holds:
        raise Violation(otherwise)


def bits(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """A copy of the adapter's trained tensors, by name."""
    return {key: value.clone() for key, value in model.state_dict().items() if key.endswith(f".{adapter}.weight")}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether every tensor is there and has the same bits."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


class Turmoil:
    """Draws events for a model. Each checks what it can: events are to change nothing but what they say.

    Args:
        model: carries the adapters that are trained; they are never changed nor deleted here.
        folder: where adapters are saved.
        seed: of the events and their settings.
    """

    def __init__(self, model: PeftModel, folder: Path, seed: int) -> None:
        self.model, self.folder, self.random = model, folder, random.Random(seed)
        self.trained = list(model.peft_config)
        self.guests: dict[str, dict[str, Tensor]] = {}
        self.saved: dict[str, dict[str, Tensor]] = {}
        self.probe = token_batches(1, seed=seed + 1)[0]
        self.checkpointing = False
        with model.disable_adapter():
            self.base_logits = self._logits()
        self.events: dict[str, Callable[[], None]] = {
            name.removeprefix("do_").replace("_", " "): getattr(self, name)
            for name in sorted(dir(self))
            if name.startswith("do_")
        }

    def happen(self) -> str:
        """One event, drawn at random; its name. One for which there is no room or no adapter does nothing."""
        name = self.random.choice(list(self.events))
        self.events[name]()
        return name

    def rest(self, adapter: str | None = None) -> None:
        """Undo what stands in training's way, and make ``adapter`` the active one; None: and forget all guests."""
        self._unmerge()
        if adapter is None:
            self.saved.clear()
            for guest in list(self.guests):
                self._delete(guest)
        self.model.set_adapter(adapter or self.trained[0])
        self.model.train()

    def do_add(self) -> None:
        if len(self.guests) < GUESTS:
            settings = {key: self.random.choice(values) for key, values in SETTINGS.items()}
            name = self._free_name()
            self.model.add_adapter(name, SnellConfig(target_modules="all-linear", **settings))
            self.guests[name] = bits(self.model, name)

    def do_delete(self) -> None:
        if self.guests:
            self._delete(self.random.choice(list(self.guests)))

    def do_switch(self) -> None:
        self.model.set_adapter(self._any())

    def do_activate_several(self) -> None:
        self.model.base_model.set_adapter(self._some())

    def do_disable(self) -> None:
        with self.model.disable_adapter():
            check(torch.equal(self._logits(), self.base_logits), "a disabled adapter changes the base model's outputs")

    def do_merge(self) -> None:
        self.model.merge_adapter(self._some(), safe_merge=self.random.random() < 0.5)

    def do_unmerge(self) -> None:
        self._unmerge()

    def do_evaluate(self) -> None:
        check(bool(self._logits().isfinite().all()), "an evaluation gave NaN or infinity")

    def do_mix(self) -> None:
        self._unmerge()
        names = [self.random.choice([*self.model.peft_config, "__base__"]) for _ in self.probe]
        logits = self._logits(adapter_names=names)
        own = [i for i, name in enumerate(names) if name == "__base__"]
        check(torch.equal(logits[own], self.base_logits[own]), "a mixed batch changes the base model's outputs")

    def do_save(self) -> None:
        names = self._some()
        save_adapter(self.model, self.folder, selected_adapters=names)
        self.saved |= {name: bits(self.model, name) for name in names}

    def do_load(self) -> None:
        if self.saved and len(self.guests) < GUESTS:
            name, source = self._free_name(), self.random.choice(list(self.saved))
            where = self.folder if source == "default" else self.folder / source
            self.model.load_adapter(str(where), name)
            self.guests[name] = bits(self.model, name)
            check(_values_equal(self.guests[name], self.saved[source]), "a loaded adapter differs from the saved one")

    def do_state_dict(self) -> None:
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(state, strict=True)
        check(same(dict(self.model.state_dict()), state), "a state dict does not come back as it was")

    def do_checkpointing(self) -> None:
        self.checkpointing = not self.checkpointing
        if self.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def _delete(self, guest: str) -> None:
        check(same(bits(self.model, guest), self.guests.pop(guest)), "an adapter that was not trained has changed")
        if guest in self.model.active_adapters:
            self.model.set_adapter(self.trained[0])
        # PEFT refuses while it is merged.
        self._unmerge()
        self.model.delete_adapter(guest)

    def _unmerge(self) -> None:
        if any(module.merged for module in self.model.modules() if isinstance(module, BaseTunerLayer)):
            self.model.unmerge_adapter()

    @torch.no_grad()
    def _logits(self, **settings: Any) -> Tensor:
        training = self.model.training
        self.model.eval()
        logits = self.model(input_ids=self.probe, use_cache=False, **settings).logits
        self.model.train(training)
        return logits

    def _free_name(self) -> str:
        return next(name for name in (f"guest {i}" for i in range(GUESTS)) if name not in self.guests)

    def _any(self) -> str:
        return self.random.choice(list(self.model.peft_config))

    def _some(self) -> list[str]:
        names = list(self.model.peft_config)
        return self.random.sample(names, self.random.randint(1, min(2, len(names))))


def _values_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two adapters hold the same bits, whatever their names."""
    ours, theirs = ({key.rsplit(".", 2)[0]: value for key, value in one.items()} for one in (ours, theirs))
    return same(ours, theirs)
