"""Banks: the factors of N adapters for one layer, trained or regenerated from a seed. They are constants."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from snell import counter
from snell.peft.common import checkpoint
from snell.peft.snell.config import SnellConfig

__all__ = ["Bank", "Source", "random_source", "trained_source"]


class Factors(NamedTuple):
    """``A [N, n, r]`` and ``B [N, m, r]``."""

    A: Tensor
    B: Tensor


class Bank:
    """The factors of one layer's bank, made when they are first asked for. Copies of a model share them.

    Args:
        make: returns them.
        num: N.  rank: r.
        fingerprint: 8 bytes that tell its :class:`Source` from others.
    """

    def __init__(self, make: Callable[[], Factors], num: int, rank: int, fingerprint: bytes) -> None:
        self._make, self.num, self.rank, self.fingerprint = make, num, rank, fingerprint
        self._factors: Factors | None = None

    def on(self, device: torch.device) -> Factors:
        """The factors on this device, where they stay until they are asked for elsewhere."""
        if self._factors is None:
            self._factors = self._make()
        if self._factors.A.device != device:
            self._factors = Factors(*(t.to(device) for t in self._factors))
        return self._factors

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        return self


class Source(NamedTuple):
    """Where the banks of a model's layers come from.

    Attributes:
        bank: ``(module, n, m) ->`` its bank, or a ValueError where there is none.
        modules: names of the modules that have one; None: any module has.
        settings: how trained SNELL adapters merge; None for LoRA's product, or if the user's settings say it.
        theta: ``module ->`` trained scalars of their kernel function, where they have any.
    """

    bank: Callable[[str, int, int], Bank]
    modules: frozenset[str] | None = None
    settings: SnellConfig | None = None
    theta: Callable[[str], Tensor | None] = lambda module: None


def _digest(*parts: Any) -> bytes:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()


def random_source(seed: int, num: int, rank: int, mixed: int, dtype: torch.dtype) -> Source:
    """Random banks, drawn anew wherever they are needed: a seed is all that is stored.

    Numbers are uniform. A mean over ``mixed`` adapters has the size of one adapter's factors: in A a variance of
    1 / (3 n), which LoRA's A starts with, in B of 1 / (3 r).
    """

    def make(module: str, n: int, m: int) -> Factors:
        key = int.from_bytes(_digest(seed, module), "little", signed=True)
        found = [torch.empty(num, size, rank, dtype=dtype) for size in (n, m)]
        for i in range(num):
            both = counter.uniform((n + m) * rank, key, i * (n + m) * rank).view(n + m, rank)
            for factor, part, fan in zip(found, (both[:n], both[n:]), (n, rank), strict=True):
                factor[i] = part * math.sqrt(mixed / fan)
        return Factors(*found)

    fingerprint = _digest("random", seed, num, rank, mixed)
    return Source(lambda module, n, m: Bank(partial(make, module, n, m), num, rank, fingerprint))


@dataclass(frozen=True)
class _Adapter:
    """One saved adapter: what kind it is, its scaling, and its tensors by name."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    digest: bytes

    @classmethod
    def read(cls, folder: str) -> _Adapter:
        path = Path(folder)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            if not (path / name).is_file():
                raise ValueError(f"bank must name folders of saved adapters; {path} has no {name}")
        settings, weights = json.loads((path / CONFIG_NAME).read_text()), path / SAFETENSORS_WEIGHTS_NAME
        kind = settings.get("peft_type")
        if kind not in ("LORA", "SNELL"):
            raise ValueError(f"bank must name LoRA or SNELL adapters; {path} holds {kind}")
        for option in ("use_dora", "lora_bias", "alpha_pattern", "rank_pattern", "sparsity_pattern"):
            if settings.get(option):
                raise ValueError(f"bank: the adapter in {path} was trained with {option}, which factors do not hold")
        if settings.get("init_weights") == "identity":
            raise ValueError(f"bank: the adapter in {path} has an identity start, which a mixture would not subtract")
        tensors = checkpoint.modernised(("snell_A", "snell_B", "snell_theta"), load_file(weights))
        return cls(settings, tensors, hashlib.blake2b(weights.read_bytes(), digest_size=8).digest())

    @property
    def kind(self) -> str:
        return self.settings["peft_type"]

    @property
    def modules(self) -> set[str]:
        ends = (".lora_A.weight", ".snell_A.weight")
        return {name[: -len(end)] for name in self.tensors for end in ends if name.endswith(end)}

    def factors(self, module: str) -> Factors:
        """``A [n, r]`` and ``B [m, r]``, LoRA's scaling in B."""
        if self.kind == "SNELL":
            return Factors(*(self.tensors[f"{module}.snell_{factor}.weight"] for factor in "AB"))
        A, B = (self.tensors[f"{module}.lora_{factor}.weight"] for factor in "AB")
        rank = self.settings["r"]
        scaling = self.settings["lora_alpha"] / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        return Factors(A.t(), B * scaling)

    def make_up(self) -> dict[str, Any]:
        """What all adapters of a bank must have alike."""
        names = ("r",) if self.kind == "LORA" else ("r", "sparsity", "kernel", "groups", "gate", "scale")
        return {"peft_type": self.kind, **{name: self.settings[name] for name in names}}


@lru_cache(maxsize=1)
def trained_source(folders: tuple[str, ...], dtype: torch.dtype) -> Source:
    """The banks of saved adapters, in the order of their folders.

    Raises:
        ValueError: a folder without an adapter, or adapters that differ in kind, rank, settings or modules.
    """
    adapters = [_Adapter.read(folder) for folder in folders]
    first = adapters[0]
    for folder, adapter in zip(folders, adapters, strict=True):
        for name, value in adapter.make_up().items():
            if value != first.make_up().get(name):
                expected = first.make_up().get(name)
                raise ValueError(f"bank: adapters must have one {name}; {folder} has {value!r}, the first {expected!r}")
        if adapter.modules != first.modules:
            other = sorted(adapter.modules ^ first.modules)
            raise ValueError(f"bank: adapters must be of the same modules; {folder} and the first differ in {other[0]}")
    names = {module.removeprefix("base_model.model."): module for module in first.modules}
    fingerprint = _digest(*(adapter.digest.hex() for adapter in adapters))

    def make(module: str) -> Factors:
        pairs = [adapter.factors(names[module]) for adapter in adapters]
        return Factors(*(torch.stack(factors).to(dtype).contiguous() for factors in zip(*pairs, strict=True)))

    def bank(module: str, n: int, m: int) -> Bank:
        if module not in names:
            raise ValueError(f"bank: its adapters have no {module}; set target_modules to theirs, or leave it None")
        A, B = first.factors(names[module])
        if (len(A), len(B)) != (n, m):
            raise ValueError(f"bank: {module} is [{m}, {n}], its adapters are for [{len(B)}, {len(A)}]")
        return Bank(partial(make, module), len(adapters), first.settings["r"], fingerprint)

    def theta(module: str) -> Tensor | None:
        key = f"{names[module]}.snell_theta.weight"
        found = [adapter.tensors.get(key) for adapter in adapters]
        if found[0] is None:
            return None
        if not all(other is not None and other.equal(found[0]) for other in found):
            raise ValueError(f"bank: the adapters' trained scalars of {module} differ; factors alone can be mixed")
        return found[0]

    settings = None
    if first.kind == "SNELL":
        names_of = ("r", "sparsity", "kernel", "groups", "gate", "scale")
        settings = SnellConfig(**{name: first.settings[name] for name in names_of})
    return Source(bank, frozenset(names), settings, theta)
