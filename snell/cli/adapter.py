"""Reads a saved SNELL adapter without its base model. Every fault of the files is reported in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from snell import functional
from snell.functional import WEIGHT_DTYPES
from snell.initial import identity_start
from snell.peft import SnellConfig
from snell.peft.snell.competition import thresholds
from snell.spec import Spec
from snell.update import Update

#: Older adapters have no ".weight" at the end.
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.snell_(?P<name>A|B|theta|sparsity)(?:\.weight)?$")


@dataclass(frozen=True)
class Adapter:
    """A saved adapter.

    Attributes:
        folder, config: where it is, and its settings.
        keys: keys of its tensors in the file, by layer and name (A, B, theta, sparsity). Layers have their names in the
            base model and are sorted by them.
    """

    folder: Path
    config: SnellConfig
    keys: dict[str, dict[str, str]]

    def updates(self) -> Iterator[tuple[str, Update]]:
        """Each layer's name and update, one layer in memory at a time, unless all compete with each other."""
        if self.config.competition == "model":
            yield from self._competing()
            return
        yield from self._by_themselves()

    def _competing(self) -> Iterator[tuple[str, Update]]:
        updates = dict(self._by_themselves())

        def taus(updates: list[Update]) -> list[Tensor]:
            return thresholds([(*update[:3], update.spec) for update in updates], self.config.sparsity)

        starts = [update.start for update in updates.values() if update.start is not None]
        starts = [start._replace(tau=tau) for start, tau in zip(starts, taus(starts), strict=True)] if starts else []
        for place, (name, tau) in enumerate(zip(updates, taus(list(updates.values())), strict=True)):
            yield name, updates[name]._replace(tau=tau, start=starts[place] if starts else None)

    def _by_themselves(self) -> Iterator[tuple[str, Update]]:
        with weights(self.folder) as file:
            for layer, keys in self.keys.items():
                yield layer, self._update(layer, {name: file.get_tensor(key) for name, key in keys.items()})

    def others(self) -> list[Path]:
        """Folders inside this one that hold other adapters."""
        return sorted(path.parent for path in self.folder.glob(f"*/{CONFIG_NAME}"))

    def frozen(self) -> dict[str, int]:
        """The step at which SafeCallback froze each frozen layer, from the Trainer's state beside the adapter."""
        try:
            state = json.loads((self.folder / "trainer_state.json").read_text())
            frozen = state["stateful_callbacks"]["SafeCallback"]["attributes"]["saved"]["frozen"]
            return {name.removeprefix("base_model.model."): facts["step"] for name, facts in frozen.items()}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def _update(self, layer: str, tensors: dict[str, Tensor]) -> Update:
        configured, scale = self.config.spec_of(layer), self.config.scale
        own = tensors.pop("sparsity", None)  # of a layer that a budget was divided among
        spec = configured if own is None else replace(configured, sparsity=own.item())
        needed = ["A", "B", *(["theta"] if self.config.trains_theta and spec.num_theta else [])]
        for name in needed:
            if name not in tensors:
                raise click.ClickException(f"{self.folder} lacks snell_{name} of {layer}: the adapter is incomplete")
        tensors = _as_loaded(layer, tensors)
        A, B = tensors["A"], tensors["B"]
        theta = tensors.get("theta", torch.tensor(spec.initial_theta(scale), dtype=A.dtype))
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise click.ClickException(f"snell_{name} of {layer} holds NaN or infinite values")
        if not _fit(A, B, theta, spec):
            shapes = ", ".join(f"snell_{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise click.ClickException(f"{layer} holds {shapes}, which does not fit rank {spec.rank} of {CONFIG_NAME}")
        start = None
        if self.config.init_weights == "identity":
            start = identity_start(len(B), A, configured, scale, self.config.init_seed)
        return functional.update(A, B, theta, spec, None if start is None else start.update)


def _fit(A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> bool:
    factors = all(factor.dim() == 2 and factor.shape[0] and factor.shape[1] == spec.rank for factor in (A, B))
    return factors and theta.shape == (spec.num_theta,)


def _as_loaded(layer: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converted to the dtype in which a model holds them: float64 if all were saved so, float32 otherwise."""
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            found, *known = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *WEIGHT_DTYPES))
            raise click.ClickException(f"snell_{name} of {layer} is {found}; an adapter is {', '.join(known)}")
    doubles = all(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if doubles else torch.float32
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def weights(folder: Path) -> safe_open:
    """The adapter's file of tensors."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.exists():
        raise click.ClickException(f"{folder} holds {CONFIG_NAME} but no {SAFETENSORS_WEIGHTS_NAME}")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise click.ClickException(f"{path} cannot be read: {error}") from error


def _find(folder: Path) -> Path:
    """``folder``, or its only subfolder with an adapter: ``save_pretrained`` puts all but "default" into subfolders."""
    if (folder / CONFIG_NAME).exists():
        return folder
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not inner:
        raise click.ClickException(f"{folder} holds no {CONFIG_NAME}: it is not the folder of a saved adapter")
    if len(inner) > 1:
        raise click.ClickException(f"{folder} holds several adapters, name one: {', '.join(map(str, inner))}")
    return inner[0]


def tuner_of(folder: Path) -> tuple[Path, str]:
    """The folder that holds the adapter, and the adapter's tuner: ``SNELL``, ``RED`` or ``XPEFT``."""
    folder = _find(folder)
    path = folder / CONFIG_NAME
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path} cannot be read: {error}") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind not in ("SNELL", "RED", "XPEFT"):
        raise click.ClickException(
            f"{folder} holds no SNELL, RED or X-PEFT adapter: its peft_type is {kind or 'missing'}"
        )
    return folder, kind


def _config(folder: Path) -> SnellConfig:
    try:
        config = SnellConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise click.ClickException(f"{folder / CONFIG_NAME} does not describe a SNELL adapter: {error}") from error
    assert isinstance(config, SnellConfig)
    return config


def natural(name: str) -> list[tuple[bool, int | str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


def read(folder: Path) -> Adapter:
    """The SNELL adapter in ``folder``, as :func:`tuner_of` gives it. Its tensors are read later, by ``updates``.

    Raises:
        click.ClickException: what is wrong with it, in a sentence.
    """
    config = _config(folder)
    keys: dict[str, dict[str, str]] = {}
    with weights(folder) as file:
        for key in sorted(file.keys()):
            if match := _FACTOR.match(key):
                keys.setdefault(match["layer"], {})[match["name"]] = key
    if not keys:
        raise click.ClickException(f"{folder / SAFETENSORS_WEIGHTS_NAME} holds no tensor of a SNELL adapter")
    return Adapter(folder, config, {layer: keys[layer] for layer in sorted(keys, key=natural)})
