"""Train, test, and what one training step costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.demo_data import Images

__all__ = ["accuracy", "num_trainable", "saved_bytes", "step_seconds", "train"]

BATCH = 32


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def num_trainable(model: nn.Module) -> int:
    """Trainable parameters, counted one by one."""
    return sum(p.numel() for p in _trainable(model))


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
    optimizer = torch.optim.AdamW(_trainable(model), lr=lr, weight_decay=0.0)
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


def saved_bytes(model: nn.Module, batch: Images) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # Holding the tensors keeps an address from being given out twice.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, batch)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del loss
    return sum(size for address, size in sizes.items() if address not in parameters)


def step_seconds(models: Sequence[nn.Module], batch: Images, repetitions: int) -> list[float]:
    """Median seconds of a training step of each model, taking turns so that the machine's moods hit all alike."""
    # A rate of 0 costs what any other does and leaves the models as they are.
    optimizers = [torch.optim.AdamW(_trainable(model), lr=0.0) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(repetitions):
        for model, optimizer, taken in zip(models, optimizers, seconds, strict=True):
            start = time.perf_counter()
            _step(model.train(), optimizer, batch)
            taken.append(time.perf_counter() - start)
    for model in models:
        model.eval()
    return [statistics.median(taken) for taken in seconds]
