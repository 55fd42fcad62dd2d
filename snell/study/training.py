"""One run: a method trained at a rate on a draw, and judged."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snell.bench.memory import num_trained
from snell.bench.protocol import cosine
from snell.study.methods import Method, adapt
from snell.study.tasks import Task

BATCH = 32
#: The rate of the new head, the same for all methods. A probe, which has nothing else to train, has its own.
HEAD_RATE = 3e-3


@dataclass(frozen=True)
class Setting:
    """What a comparison keeps the same: the task's name, rank, number of labels (or labels a class) and steps."""

    task: str
    layers: int
    rank: int
    labels: int | None
    per_class: int | None
    steps: int

    def __str__(self) -> str:
        return f"rank {self.rank}"


class Classifier(nn.Module):
    """A linear head on a backbone's features."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, classes)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.backbone(**inputs))


def built(backbone: nn.Module, classes: int, method: Method, rank: int, draw: int) -> nn.Module:
    """A copy of the backbone, adapted. The draw settles the new head, alike for all methods, and the adapters."""
    torch.manual_seed(draw)
    model = Classifier(copy.deepcopy(backbone), classes)
    torch.manual_seed(draw)
    return adapt(model, method, rank, draw)


def optimizer_of(model: nn.Module, method: Method, rate: float) -> torch.optim.Optimizer:
    """AdamW on what is trained; the head has a rate of its own."""
    named = [(name.split("."), p) for name, p in model.named_parameters() if p.requires_grad]
    head_rate = rate if method.name == "probe" else HEAD_RATE
    groups = [
        {"params": [p for name, p in named if "head" in name], "lr": head_rate},
        {"params": [p for name, p in named if "head" not in name], "lr": rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0, fused=True)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
) -> list[float]:
    """A step for each batch of inputs and labels; returns the steps' processor times in seconds."""
    seconds = []
    for inputs, labels in batches:
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(**inputs), labels).backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.process_time() - start)
    return seconds


def train_and_judge(
    task: Task, backbone: nn.Module, setting: Setting, method: Method, rate: float, draw: int, judge: str
) -> dict[str, float]:
    """Train with AdamW, without weight decay or dropout, on a cosine schedule.

    Returns:
        ``accuracy`` in percent on the draw's examples of the part that judges; ``seconds``, the median processor time
        of a step, which does not grow while the process is paused; ``trained``, the number of trained parameters.
    """
    data = task.draw(draw, setting.labels, setting.per_class, setting.steps, BATCH, judge)
    # Dropout would draw other numbers with other methods.
    model = built(backbone, task.classes, method, setting.rank, draw).eval()
    optimizer = optimizer_of(model, method, rate)
    batches = ((task.inputs(examples), task.labels[examples]) for examples in data.order.split(BATCH))
    seconds = fit(model, optimizer, cosine(optimizer, setting.steps), batches)
    return {
        "accuracy": accuracy(model, task, data.judge),
        "seconds": sorted(seconds)[len(seconds) // 2],
        "trained": num_trained(model),
    }


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, examples: Tensor) -> float:
    """Share of the examples that the model names rightly, in percent."""
    if task.lengths is not None:
        examples = examples[task.lengths[examples].argsort()]
    parts = examples.split(4 * BATCH)
    right = sum(int((model(**task.inputs(part)).argmax(1) == task.labels[part]).sum()) for part in parts)
    return 100 * right / len(examples)
