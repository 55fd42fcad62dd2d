"""Train, test, and what one training step costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snell.bench.demo_data import Images
from snell.bench.measure import interleaved, saved_bytes

__all__ = ["accuracy", "costs", "num_trainable", "train"]

BATCH = 32


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def num_trainable(model: nn.Module) -> int:
    """Trainable parameters, counted one by one."""
    return sum(p.numel() for p in _trainable(model))


def _optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    # Fused, since a small model's step is mostly calls.
    return torch.optim.AdamW(_trainable(model), lr=lr, weight_decay=0.0, fused=True)


def _loss(model: nn.Module, batch: Images) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch.pixels).logits, batch.labels)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Images) -> None:
    optimizer.zero_grad()
    _loss(model, batch).backward()
    optimizer.step()


def train(
    model: nn.Module, data: Images, *, lr: float, steps: int, seed: int, on_step: Callable[[], object] = lambda: None
) -> None:
    """AdamW over random batches; the rate warms up over a tenth of the steps, then falls along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, lr)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    model.train()
    for _ in range(steps):
        _step(model, optimizer, data[torch.randint(len(data), (BATCH,), generator=generator)])
        schedule.step()
        on_step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """Share of ``data`` that ``model`` names rightly, in percent."""
    return 100 * (model(pixel_values=data.pixels).logits.argmax(1) == data.labels).double().mean().item()


def costs(models: Sequence[nn.Module], batch: Images, repetitions: int) -> list[tuple[int, float]]:
    """Of each model's training step: bytes kept between forward and backward, and median seconds."""
    # A rate of 0 costs what any other does and leaves the models as they are.
    optimizers = [_optimizer(model.train(), lr=0.0) for model in models]
    kept = [saved_bytes(lambda model=model: _loss(model, batch), model.parameters()) for model in models]
    steps = [partial(_step, model, optimizer, batch) for model, optimizer in zip(models, optimizers, strict=True)]
    seconds = interleaved(steps, "cpu", repetitions, lambda: None)
    for model in models:
        model.eval()
    return list(zip(kept, map(statistics.median, seconds), strict=True))
