"""The methods that a study compares, and how one is written: ``lora``, ``snell:sparsity=0.5,gate=hard``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import click
from peft import get_peft_model
from torch import nn

from snell.bench.contenders import ADAPT, probe, targets
from snell.peft import RedConfig

#: The learning rates that may be tried.
GRID = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 2, 5))


class Known(NamedTuple):
    """A method's name in the tables, and the lowest of the five rates that it begins with."""

    label: str
    lowest: float


KNOWN = {
    "lora": Known("LoRA", 1e-3),
    "full": Known("full fine-tuning", 5e-5),
    "probe": Known("linear probe", 1e-3),
    "snell": Known("SNELL", 1e-3),
    "rslora": Known("rsLoRA", 5e-4),
    "dora": Known("DoRA", 1e-3),
    "shira": Known("SHiRA", 1e-3),
    "red": Known("RED", 1e-3),
}
#: The lowest for SNELL's hard gate, which starts smaller at its own scale and takes larger rates.
LOWEST_OF_HARD = 2e-3

#: The order in which a study takes them: those that answer most come first.
PLAN = (
    "lora",
    "snell",
    "full",
    "snell:gate=magnitude",
    "snell:sparsity=0.5",
    "snell:sparsity=0",
    "snell:gate=hard",
    "snell:sparsity=0.99",
    "snell:gate=magnitude,init_weights=identity",
    "snell:init_weights=identity",
    "snell:gate=hard,init_weights=identity",
    "dora",
    "rslora",
    "shira",
    "red",
    "probe",
)


@dataclass(frozen=True)
class Method:
    """A method with settings of its own, in the words of its configuration."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in self.settings)
        return f"{self.name}:{settings}" if settings else self.name

    @property
    def label(self) -> str:
        """Its name in a table: SNELL's with sparsity and gate."""
        if self.name != "snell":
            return " ".join([KNOWN[self.name].label, *(f"{key} {value}" for key, value in self.settings)])
        settings = {"gate": "soft", "sparsity": 0.9, **dict(self.settings)}
        gate, sparsity = settings.pop("gate"), settings.pop("sparsity")
        more = ", identity start" if settings.pop("init_weights", None) == "identity" else ""
        more += "".join(f", {key} {value}" for key, value in settings.items())
        return f"SNELL {sparsity:g} {gate}{more}" if sparsity else f"SNELL 0{more}"

    @property
    def first_rates(self) -> tuple[float, ...]:
        """The five that are tried first."""
        settings = dict(self.settings)
        small = settings.get("gate") == "hard" and "scale" not in settings
        start = GRID.index(LOWEST_OF_HARD if small else KNOWN[self.name].lowest)
        return GRID[start : start + 5]


def parse(text: str) -> Method:
    """The method that ``text`` names.

    Raises:
        click.BadParameter: no such method, or settings that are not ``key=value``.
    """
    name, _, rest = text.partition(":")
    if name not in KNOWN:
        raise click.BadParameter(f"{name!r} is no method: there are {', '.join(KNOWN)}")
    settings = []
    for pair in rest.split(",") if rest else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"settings are written key=value; got {pair!r} in {text!r}")
        try:
            settings.append((key, ast.literal_eval(value)))
        except (SyntaxError, ValueError):
            settings.append((key, value))
    return Method(name, tuple(sorted(settings)))


def adapt(
    model: nn.Module, method: Method, rank: int, draw: int, head: str | None = "head", layers: Sequence[str] = ()
) -> nn.Module:
    """``model`` with the method's parameters trainable, and its ``head``. RED has no rank.

    Args:
        layers: those that PEFT's methods adapt; all linear ones unless given.
    """
    settings = dict(method.settings)
    if layers:
        settings["target_modules"] = set(layers)
    match method.name:
        case "probe":
            return probe(model, "head")
        case "full":
            return ADAPT["full"](model, rank)
        case "snell":
            seed = {"init_seed": draw} if settings.get("init_weights") == "identity" else {}
            settings = {"scale": None, **seed, **settings}
        case "red":
            config = RedConfig(
                **{"target_modules": targets(model), "modules_to_save": [head] if head else None, **settings}
            )
            return get_peft_model(model, config)
        case "lora" | "dora" | "rslora":
            settings = {"lora_alpha": 2 * rank, "use_rslora": method.name == "rslora", **settings}
    name = {"rslora": "lora"}.get(method.name, method.name)
    return ADAPT[name](model, rank, head=head, **settings)
