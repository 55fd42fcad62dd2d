"""The table and JSON of ``snell inspect`` for masks over a bank."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from snell.cli.adapter import natural, weights
from snell.cli.inspect_rows import show
from snell.peft import XpeftConfig
from snell.peft.xpeft.masks import chosen

_MASK = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.xpeft_(?P<name>[AB])\.weight$")


@dataclass(frozen=True)
class Row:
    """One layer's figures, means over its profiles.

    Attributes:
        name: of the module in the base model.
        adapters: N.  profiles: how many there are.
        effective_A, effective_B: how many adapters share the weight: k of a hard mask, e to the entropy of a soft one.
        common: share of A's weight that falls on adapters that B weighs as much or more.
        apart: share of a profile's weight that is on other adapters than the mean profile's; 0 for one profile.
    """

    name: str
    adapters: int
    profiles: int
    effective_A: float
    effective_B: float
    common: float
    apart: float


_COLUMNS = {
    "layer": lambda r: r.name,
    "adapters": lambda r: str(r.adapters),
    "profiles": lambda r: str(r.profiles),
    "in use: A": lambda r: f"{r.effective_A:.4g}",
    "B": lambda r: f"{r.effective_B:.4g}",
    "A and B alike": lambda r: f"{100 * r.common:.3g} %",
    "profiles apart": lambda r: f"{100 * r.apart:.3g} %",
}


def measure(name: str, logits: tuple[Tensor, Tensor], k: int | None) -> Row:
    """The figures of one layer's logits ``[P, N]``."""

    def shares(of: Tensor) -> Tensor:
        return torch.softmax(of.double(), -1) if k is None else chosen(of, k).double() / k

    A, B = (shares(of) for of in logits)
    in_A, in_B = (torch.special.entr(w).sum(-1).exp().mean().item() for w in (A, B))
    common = torch.minimum(A, B).sum(-1).mean().item()
    apart = (A - A.mean(0)).abs().sum(-1).mean().item() / 2
    return Row(name, A.shape[1], len(A), in_A, in_B, common, apart)


def report(folder: Path, out: Path) -> None:
    """Print the table, and write the JSON into ``out``.

    Raises:
        click.ClickException: what is wrong with the adapter, in a sentence.
    """
    try:
        config = XpeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise click.ClickException(f"{folder} does not describe an X-PEFT adapter: {error}") from error
    assert isinstance(config, XpeftConfig)
    found: dict[str, dict[str, Tensor]] = {}
    with weights(folder) as file:
        for key in file.keys():  # noqa: SIM118
            if match := _MASK.match(key):
                found.setdefault(match["layer"], {})[match["name"]] = file.get_tensor(key)
    if not found:
        raise click.ClickException(f"{folder} holds no mask of an X-PEFT adapter")
    for layer, masks in found.items():
        expected = (config.num_profiles, config.num_adapters)
        for name in "AB":
            if name not in masks or tuple(masks[name].shape) != expected or not masks[name].isfinite().all():
                raise click.ClickException(f"xpeft_{name} of {layer} must hold finite numbers of shape {expected}")
    rows = [measure(name, (found[name]["A"], found[name]["B"]), config.chosen) for name in sorted(found, key=natural)]
    source = f"seed {config.bank_seed}" if config.bank is None else f"{len(config.bank)} folders"
    heading = f"X-PEFT, {config.masks} masks over {config.num_adapters} adapters ({source})"
    show(folder, out, heading, rows, _COLUMNS)
