"""A task that needs no download: a small vision transformer moves between two domains of handwritten digits.

The source domain is scikit-learn's digits as they are: upright, bright ink on a black ground. The target domain is
other digits under three changes at once: a quarter turn, inverted contrast, and noise over the whole image. No image
stands in both domains, nor in two splits.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from snell.bench import contenders
from snell.bench.clock import Step
from snell.bench.memory import trained
from snell.bench.protocol import Job, cosine

#: Makes a model with a new head out of the pre-trained one.
Build = Callable[[nn.Module], nn.Module]

CLASSES, NOISE, BATCH, RANK = 10, 0.1, 32, 8


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
    rest, parts = torch.arange(len(everything)), []
    for count in (700, 100, 300, 200):
        taken, left = train_test_split(rest.numpy(), train_size=count, stratify=labels[rest], random_state=0)
        parts.append(everything[torch.from_numpy(taken)])
        rest = torch.from_numpy(left)
    generator = torch.Generator().manual_seed(0)
    target = [_to_target(images, generator) for images in (*parts[2:], everything[rest])]
    return Domains(*parts[:2], *target)


def draw_few(pool: Images, per_class: int, seed: int) -> Images:
    """``per_class`` images of each digit, drawn from ``pool`` without replacement."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    chosen = [order[pool.labels[order] == digit][:per_class] for digit in range(CLASSES)]
    return pool[torch.cat(chosen)]


def new_vit() -> ViTForImageClassification:
    """A vision transformer over 16 patches of 2x2 pixels, its weights drawn from torch's generator."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=CLASSES, **sizes))


def with_new_head(pretrained: nn.Module) -> nn.Module:
    """A copy of the network with a head drawn anew."""
    model = copy.deepcopy(pretrained)
    model.classifier = nn.Linear(model.classifier.in_features, CLASSES)
    return model


def linear_probe(pretrained: nn.Module) -> nn.Module:
    return contenders.probe(with_new_head(pretrained), "classifier")


def lora(pretrained: nn.Module) -> nn.Module:
    return contenders.ADAPT["lora"](with_new_head(pretrained), RANK, head="classifier")


def snell(pretrained: nn.Module, **settings: Any) -> nn.Module:
    """With SNELL's ``settings``, its defaults unless given."""
    return contenders.snell_layers(linear_probe(pretrained), RANK, **settings)


def shown_layer(pretrained: nn.Module) -> str:
    """Name of the encoder's last linear layer that widens."""
    linears = [(name, layer) for name, layer in pretrained.named_modules() if isinstance(layer, nn.Linear)]
    return [name for name, layer in linears if layer.out_features > layer.in_features][-1]


def loss(model: nn.Module, batch: Images) -> Tensor:
    """Cross entropy over the batch."""
    return nn.functional.cross_entropy(model(pixel_values=batch.pixels).logits, batch.labels)


def optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW for what is trained; fused, since a small model's step is mostly calls."""
    return torch.optim.AdamW(trained(model), lr=rate, weight_decay=0.0, fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Images) -> None:
    """One training step."""
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()


def batches(data: Images, seed: int) -> Iterator[Images]:
    """Random batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield data[torch.randint(len(data), (BATCH,), generator=generator)]


def train(model: nn.Module, data: Images, rate: float, steps: int, seed: int, tick: Step = lambda: None) -> None:
    """AdamW over random batches; the rate warms up over a tenth of the steps, then falls along a cosine."""
    adamw = optimizer(model, rate)
    rates = cosine(adamw, steps)
    model.train()
    for batch in itertools.islice(batches(data, seed), steps):
        step(model, adamw, batch)
        rates.step()
        tick()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """Share of ``data`` that ``model`` names rightly, in percent."""
    return 100 * (model(pixel_values=data.pixels).logits.argmax(1) == data.labels).double().mean().item()


@dataclass(frozen=True)
class Settings:
    """How long the network is pre-trained and tuned, and for how many labels."""

    pretraining_steps: int = 700
    pretraining_rate: float = 1e-3
    steps: int = 120
    labels_per_class: int = 10


class Transfer:
    """A network trained on the source domain, to be tuned for the target; ``bar`` counts steps of every kind."""

    def __init__(self, settings: Settings | None = None, bar: tqdm | None = None) -> None:
        self.settings, self.domains = settings or Settings(), load_domains()
        self.bar = tqdm(disable=True) if bar is None else bar
        torch.manual_seed(0)
        self.pretrained, schedule = new_vit(), (self.settings.pretraining_rate, self.settings.pretraining_steps)
        train(self.pretrained, self.domains.source_train, *schedule, seed=0, tick=self.bar.update)

    def few(self, seed: int) -> Images:
        """The labels of one draw."""
        return draw_few(self.domains.target_pool, self.settings.labels_per_class, seed)

    def tuned(self, build: Build, rate: float, seed: int) -> nn.Module:
        """What ``build`` makes of the pre-trained network, tuned for the target domain.

        The seed decides labels, batches, new head and factors.
        """
        torch.manual_seed(seed)
        model = build(self.pretrained)
        train(model, self.few(seed), rate, self.settings.steps, seed, self.bar.update)
        return model

    def accuracy(self, model: nn.Module, part: str) -> float:
        """On the target's ``"validation"`` or ``"test"`` images, in percent."""
        return accuracy(model, getattr(self.domains, f"target_{part}"))

    def accuracies(self, build: Build, jobs: Sequence[Job]) -> list[float]:
        """The accuracy of each job."""
        return [self.accuracy(self.tuned(build, job.rate, job.draw), job.part) for job in jobs]
