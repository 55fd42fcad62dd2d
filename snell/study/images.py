"""Fashion-MNIST, seen by a small vision transformer that was pre-trained on characters drawn in many fonts."""

from __future__ import annotations

import gzip
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers as tf
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from snell.bench.protocol import cosine
from snell.study.tasks import Task
from snell.study.training import BATCH, Classifier, fit

FASHION, FONTS = Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/fonts")

SIDE = 28
#: What the network learns to read: digits, Latin, Greek and Cyrillic letters.
RANGES = ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0x391, 0x3A1), (0x3B1, 0x3C9), (0x410, 0x42F))
CHARACTERS = [chr(code) for first, last in RANGES for code in range(first, last + 1)]
#: Pictures of a character from each font, and the pre-training's length and rate.
PICTURES, STEPS, RATE = 4, 12_000, 1e-3
#: Of Fashion-MNIST's 60,000 training images.
VALIDATION = 10_000


def _idx(path: Path) -> Tensor:
    """The array of a gzipped idx file of bytes."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape).copy())


def _pixels(images: Tensor) -> Tensor:
    """Bytes ``[N, 28, 28]`` as float32 ``[N, 1, 28, 28]`` in [-1, 1]."""
    return images.unsqueeze(1).float() / 127.5 - 1


def glyphs(folder: Path) -> tuple[Tensor, Tensor]:
    """Each character in each font that has it, at random sizes and angles: bytes ``[N, 28, 28]``, and labels."""
    paths = sorted(folder.rglob("*.ttf"))
    if not paths:
        raise click.ClickException(
            f"{folder} has no *.ttf: install Debian's fonts-noto-core, fonts-freefont-ttf, fonts-liberation and "
            "fonts-dejavu, or name a folder by --data fonts=FOLDER"
        )
    chance, images, labels = random.Random(0), [], []
    for path in tqdm([path for path in paths for _ in range(PICTURES)], desc="fonts", unit="font"):
        font = ImageFont.truetype(str(path), chance.randint(14, 26))
        missing = bytes(font.getmask("\uffff"))
        for label, character in enumerate(CHARACTERS):
            mask = bytes(font.getmask(character))
            if mask and mask != missing:
                image = Image.new("L", (SIDE, SIDE))
                place = (SIDE / 2 + chance.uniform(-3, 3), SIDE / 2 + chance.uniform(-3, 3))
                ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="mm")
                images.append(np.asarray(image.rotate(chance.uniform(-20, 20), Image.Resampling.BILINEAR)))
                labels.append(label)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


class Vit(nn.Module):
    """Mean of the vectors that a small vision transformer gives to 16 patches of 7 x 7 pixels."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "num_hidden_layers": layers,
        }
        config = tf.ViTConfig(image_size=SIDE, patch_size=7, num_channels=1, **sizes)
        self.encoder, self.width = tf.ViTModel(config, add_pooling_layer=False), config.hidden_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values=pixel_values).last_hidden_state[:, 1:].mean(1)


def pretrained(layers: int, fonts: Path, kept: Path) -> Vit:
    """The network after it has learned the characters; ``kept`` is the file that holds it between studies."""
    torch.manual_seed(0)
    backbone = Vit(layers)
    if kept.exists():
        backbone.load_state_dict(torch.load(kept, weights_only=True))
        return backbone
    images, labels = glyphs(fonts)
    model = Classifier(backbone, len(CHARACTERS))
    order = torch.randint(len(images), (STEPS, 2 * BATCH), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    batches = (({"pixel_values": _pixels(images[i])}, labels[i]) for i in tqdm(order, desc="glyphs", unit="step"))
    fit(model, optimizer, cosine(optimizer, STEPS), batches)
    partial_file = kept.with_suffix(".partial")
    torch.save(backbone.state_dict(), partial_file)
    os.replace(partial_file, kept)
    return backbone


def load(path: Path | None, fonts: Path | None, layers: int, kept: Path) -> Task:
    """The task.

    Args:
        path: of Fashion-MNIST's four gzipped files; None: where Debian installs them.
        fonts: a folder of ``*.ttf``; None: the system's.
        layers: of the network.
        kept: where the pre-trained network lies, or will.
    """
    folder = path or FASHION
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        raise click.ClickException(
            f"{folder} has no train-images-idx3-ubyte.gz: install Debian's dataset-fashion-mnist, or name a folder by "
            "--data fashion=FOLDER"
        )
    images = torch.cat([_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")])
    labels = torch.cat([_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")]).long()
    rest = len(_idx(folder / "train-labels-idx1-ubyte.gz"))
    order = torch.randperm(rest, generator=torch.Generator().manual_seed(0))
    held_out = min(VALIDATION, rest // 4)
    parts = {"pool": order[held_out:], "validation": order[:held_out], "test": torch.arange(rest, len(labels))}
    facts = {"images": f"{len(labels):,}", "classes": "10", "layers": str(layers)}
    return Task(
        labels,
        lambda examples: {"pixel_values": _pixels(images[examples])},
        partial(pretrained, layers, fonts or FONTS, kept),
        parts,
        None,
        facts,
    )
