"""A profile: the masks of all layers, kept apart from any model, and its file of packed bits."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from snell.peft.xpeft.bank import Bank
from snell.peft.xpeft.config import XpeftConfig
from snell.peft.xpeft.layer import MaskedLinear
from snell.peft.xpeft.masks import chosen

__all__ = ["HEADER_BYTES", "Profile"]

#: Magic, version, form, bytes of a layer's number of adapters, of layers, k, the bank's fingerprint, a checksum.
_HEADER = struct.Struct("<4sBBxxIII8sI")
_MAGIC, _VERSION = b"XPFT", 1
HEADER_BYTES = _HEADER.size

#: How the masks are written: as bits where they are hard, else as the logits.
_FORMS = {"bits": 0, "float16": 1, "float32": 2}


@dataclass(frozen=True)
class Profile:
    """The masks of one profile.

    Attributes:
        logits: ``[layers, 2, N]`` float32, of A and B; of a hard mask 1 for the chosen adapters and 0 for others.
        k: how many adapters a hard mask chooses; None: the masks are soft.
        bank: 8 bytes that tell the bank from others.
    """

    logits: Tensor
    k: int | None
    bank: bytes

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, adapter_name: str = "default", profile: int = 0) -> Profile:
        """The profile of an adapter in a model.

        Raises:
            ValueError: the model has no such adapter, or the adapter no such profile.
        """
        layers, config = _layers(model, adapter_name)
        if not 0 <= profile < config.num_profiles:
            raise ValueError(f"profile must lie in [0, {config.num_profiles}); got {profile}")
        masks = torch.stack([mask[profile] for layer in layers for mask in layer.masks(adapter_name)])
        logits = masks.float().cpu().view(len(layers), 2, -1)
        if config.chosen is not None:
            logits = chosen(logits, config.chosen).float()
        return cls(logits, config.chosen, layers[0].xpeft_bank[adapter_name].fingerprint)

    @torch.no_grad()
    def put_in(self, model: nn.Module, adapter_name: str = "default", profile: int = 0) -> None:
        """Switch an adapter of a model to these masks, in place.

        Raises:
            ValueError: the model has no such adapter, or one of another bank, number of layers or kind of masks.
        """
        layers, config = _layers(model, adapter_name)
        self._check(len(layers), config, layers[0].xpeft_bank[adapter_name])
        masks = [mask[profile] for layer in layers for mask in layer.masks(adapter_name)]
        torch._foreach_copy_(masks, list(self.logits.flatten(0, 1)))

    def _check(self, layers: int, config: XpeftConfig, bank: Bank) -> None:
        expected = {"layers": layers, "adapters": bank.num, "k": config.chosen}
        found = {"layers": len(self.logits), "adapters": self.logits.shape[-1], "k": self.k}
        for name, value in expected.items():
            if found[name] != value:
                raise ValueError(f"the profile does not fit the model: its {name} is {found[name]}, not {value}")
        if self.bank != bank.fingerprint:
            raise ValueError("the profile does not fit the model: it was made for another bank")

    def save(self, path: str | os.PathLike[str], dtype: str = "float16") -> None:
        """Write the file: a header of 32 bytes, then 2 L ceil(N / 8) bytes of a hard profile's bits.

        Args:
            dtype: of a soft profile's logits, float16 or float32.
        """
        form = "bits" if self.k is not None else dtype
        if form not in _FORMS:
            raise ValueError(f"dtype must be float16 or float32; got {dtype!r}")
        values = self.logits.numpy()
        body = np.packbits(values > 0, axis=-1) if form == "bits" else values.astype(form)
        (layers, _, count), content = self.logits.shape, body.tobytes()
        fixed = (_MAGIC, _VERSION, _FORMS[form], count, layers, self.k or 0, self.bank)
        temporary = Path(f"{os.fspath(path)}.partial")
        temporary.write_bytes(_HEADER.pack(*fixed, zlib.crc32(content, zlib.crc32(repr(fixed).encode()))) + content)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a file that :meth:`save` has written.

        Raises:
            ValueError: the file is no profile, or is broken.
        """
        content = Path(path).read_bytes()
        if len(content) < HEADER_BYTES or not content.startswith(_MAGIC):
            raise ValueError(f"{path} is not a profile: it does not start as one")
        *fixed, checksum = _HEADER.unpack_from(content)
        _, version, form, count, layers, k, bank = fixed
        body = content[HEADER_BYTES:]
        if version != _VERSION:
            raise ValueError(f"{path} is of version {version}; this package reads {_VERSION}")
        if checksum != zlib.crc32(body, zlib.crc32(repr(tuple(fixed)).encode())):
            raise ValueError(f"{path} is broken: its checksum does not fit its content")
        if form == _FORMS["bits"]:
            bits = np.frombuffer(body, np.uint8).reshape(layers, 2, -(-count // 8))
            values = np.unpackbits(bits, axis=-1, count=count)
        else:
            values = np.frombuffer(body, "<f2" if form == _FORMS["float16"] else "<f4").reshape(layers, 2, count)
        return cls(torch.from_numpy(values.astype(np.float32)), k or None, bank)


def _layers(model: nn.Module, adapter_name: str) -> tuple[list[MaskedLinear], XpeftConfig]:
    modules = (module for module in model.modules() if isinstance(module, MaskedLinear))
    layers = [layer for layer in modules if adapter_name in layer.adapter_names]
    if not layers:
        raise ValueError(f"adapter_name must be an X-PEFT adapter of the model; got {adapter_name!r}")
    return layers, layers[0].xpeft_config[adapter_name]
