"""Two domains of the same task: scikit-learn's handwritten digits, and digits that look like nothing of the kind.

The source domain is the digits as they are: upright, bright ink on a black ground. The target domain is other
digits under three changes at once: a quarter turn, inverted contrast, and noise over the whole image. No image
stands in both domains, nor in two splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["CLASSES", "Domains", "Images", "draw_few", "load_domains"]

CLASSES = 10
NOISE = 0.1


@dataclass(frozen=True)
class Images:
    """``pixels`` [N, 1, 8, 8] float32 about [-1, 1], ``labels`` [N] int64."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def __len__(self) -> int:
        return self.labels.shape[0]


class Domains(NamedTuple):
    """The source's training and test images; the target's pool for drawing labels, validation and test images."""

    source_train: Images
    source_test: Images
    target_pool: Images
    target_validation: Images
    target_test: Images


def _to_target(images: Images, generator: torch.Generator) -> Images:
    pixels = -images.pixels.rot90(1, (2, 3))
    return Images(pixels + 2 * NOISE * torch.randn(pixels.shape, generator=generator), images.labels)


def load_domains() -> Domains:
    """The same 1797 images, splits and noise at every call; splits are stratified by digit."""
    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    everything = Images(torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1, labels)

    def part(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
        taken, rest = train_test_split(index.numpy(), train_size=size, stratify=labels[index], random_state=0)
        return torch.from_numpy(taken), torch.from_numpy(rest)

    source_train, rest = part(torch.arange(len(everything)), 700)
    source_test, rest = part(rest, 100)
    target_pool, rest = part(rest, 300)
    target_validation, target_test = part(rest, 200)
    generator = torch.Generator().manual_seed(0)
    return Domains(
        everything[source_train],
        everything[source_test],
        *(_to_target(everything[index], generator) for index in (target_pool, target_validation, target_test)),
    )


def draw_few(pool: Images, per_class: int, seed: int) -> Images:
    """``per_class`` images of each digit, drawn from ``pool`` without replacement."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    chosen = [order[pool.labels[order] == digit][:per_class] for digit in range(CLASSES)]
    return pool[torch.cat(chosen)]
