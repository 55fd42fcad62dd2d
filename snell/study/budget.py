"""What a method may train: a share of a model's parameters in; ranks, sparsity or a prefix's length out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from snell.bench.contenders import targets

#: The methods with a rank, and with a prefix. SHiRA's rank says how many single weights it trains.
RANKED, PREFIX = ("lora", "rslora", "dora", "snell", "shira"), ("prefix",)


@dataclass(frozen=True)
class Budget:
    """How a method is set to a share of a model's parameters.

    Attributes:
        total: the model's parameters before it is adapted.
        allowed: the most that may be trained.
        trained: what the method trains, as PEFT's ``get_nb_trainable_parameters`` counts it.
        size: the rank, or the prefix's tokens; 0 for full fine-tuning.
        layers: names of the adapted layers; none for full fine-tuning and prefixes.
        sparsity: share of those layers' weights that SHiRA does not train; None for other methods.
    """

    total: int
    allowed: int
    trained: int
    size: int
    layers: tuple[str, ...] = ()
    sparsity: float | None = None


def solve(model: nn.Module, method: str, share: float, groups: int = 2, layers: Sequence[str] | None = None) -> Budget:
    """The largest setting of a method that trains at most a share of the model's parameters.

    Where all layers fit at the lowest rank, all have one rank, and one more would be too much. Elsewhere layers of the
    lowest rank, evenly spread over the model, are adapted, as many as fit. SHiRA's rank ends where a layer is trained
    whole.

    Args:
        model: not adapted yet.
        method: ``"full"``, ``"lora"``, ``"rslora"``, ``"dora"``, ``"snell"``, ``"shira"`` or ``"prefix"``: PEFT's
            prefix tuning without a projection.
        share: of the model's parameters, over 0 and at most 1.
        groups: SNELL's, which its rank is a multiple of.
        layers: names of the linear layers that may be adapted; None: those that PEFT's methods adapt in the studies.

    Raises:
        ValueError: no such method, a share outside (0, 1], no layer to adapt, or not even the smallest setting fits.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be over 0 and at most 1; got {share}")
    total = sum(parameter.numel() for parameter in model.parameters())
    allowed = int(share * total)
    if method == "full":
        return Budget(total, allowed, total, 0)
    if method in PREFIX:
        token = _of_a_prefix_token(model)
        _must_fit(method, share, allowed, token)
        return Budget(total, allowed, allowed // token * token, allowed // token)
    if method not in RANKED:
        raise ValueError(f"method must be full, prefix or one of {', '.join(RANKED)}; got {method!r}")
    names = list(targets(model) if layers is None else layers)
    if not names:
        raise ValueError("layers must name a linear layer; the model has none that is adapted")
    sides = {name: _sides(model.get_submodule(name)) for name in names}
    unit = groups if method == "snell" else 1
    fixed = {name: out if method == "dora" else 0 for name, (_, out) in sides.items()}  # DoRA's magnitudes
    rank = (allowed - sum(fixed.values())) // (unit * sum(map(sum, sides.values()))) * unit
    if rank < unit:
        rank = unit
        costs = {name: rank * sum(sides[name]) + fixed[name] for name in names}
        _must_fit(method, share, allowed, min(costs.values()))
        names = _that_fit(costs, allowed)
    if method == "shira":  # more weights than a layer has cannot be trained
        rank = min(rank, *(math.prod(sides[name]) // sum(sides[name]) for name in names))
    trained = sum(rank * sum(sides[name]) + fixed[name] for name in names)
    weights = sum(math.prod(sides[name]) for name in names)
    return Budget(total, allowed, trained, rank, tuple(names), 1 - trained / weights if method == "shira" else None)


def _sides(layer: nn.Module) -> tuple[int, int]:
    """in, out"""
    first, second = layer.weight.shape  # type: ignore[misc]
    return (first, second) if isinstance(layer, Conv1D) else (second, first)


def _that_fit(costs: dict[str, int], allowed: int) -> list[str]:
    """As many of the layers as fit, spread over the model, in its order. No other layer would fit beside them."""
    names, chosen = list(costs), set()
    golden = (5**0.5 - 1) / 2  # multiples of it, modulo 1, leave no large gap
    for index in sorted(range(len(names)), key=lambda index: (index * golden) % 1):
        if costs[names[index]] <= allowed:
            allowed -= costs[names[index]]
            chosen.add(names[index])
    return [name for name in names if name in chosen]


def _must_fit(method: str, share: float, allowed: int, least: int) -> None:
    if least > allowed:
        raise ValueError(
            f"share must allow {least} parameters, the least that {method} trains; {share} allows {allowed}"
        )


def _of_a_prefix_token(model: Any) -> int:
    """What a token of PEFT's prefix has: a key and a value for each layer."""
    config = model.config
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * config.hidden_size * kept // heads
