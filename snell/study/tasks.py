"""A classification task: examples, their three parts, and the draws that training and judging use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Shares of the examples: labels to learn from come from the pool, learning rates are chosen on validation data.
SHARES = {"pool": 0.5, "validation": 0.1, "test": 0.4}

#: Examples whose lengths are sorted before they are cut into batches, in batches.
WINDOW = 8


class Draw(NamedTuple):
    """What every method gets alike: ``order [steps * batch]`` to train on, and the examples that ``judge`` it."""

    order: Tensor
    judge: Tensor


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        labels: ``[N]`` int64.
        inputs: gives the backbone's keyword arguments for examples ``[B]``.
        backbone: builds the pre-trained network, from those arguments to ``[B, width]``; it has a ``width``.
        parts: indices ``[M]`` of ``pool``, ``validation`` and ``test``, which share none.
        lengths: ``[N]``, in tokens; None where all examples are of one length.
        facts: what a reader of the results should know.
    """

    labels: Tensor
    inputs: Callable[[Tensor], Mapping[str, Tensor]]
    backbone: Callable[[], nn.Module]
    parts: Mapping[str, Tensor]
    lengths: Tensor | None
    facts: Mapping[str, str]

    def __post_init__(self) -> None:
        together = torch.cat([self.parts[name] for name in SHARES])
        if len(together.unique()) < len(together):
            raise ValueError("parts must share no example: a model would be judged on what it has seen")

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def draw(self, number: int, labels: int | None, per_class: int | None, steps: int, batch: int, judge: str) -> Draw:
        """The examples of a draw, the same at every call.

        Args:
            number: of the draw.
            labels: examples from the pool, in its own mixture of classes; None: ``per_class`` of each class.
            steps: of training, with ``batch`` examples each.
            judge: the part that judges, and how many of it: ``"test:3000"``.

        Raises:
            ValueError: the pool has fewer examples than that.
        """
        generator = torch.Generator().manual_seed(number)
        pool = shuffled(self.parts["pool"], generator)
        if per_class is not None:
            pool = torch.cat([pool[self.labels[pool] == label][:per_class] for label in range(self.classes)])
            labels = per_class * self.classes
        if labels is None or labels > len(pool):
            raise ValueError(f"labels must be at most the {len(pool)} that the pool has; got {labels}")
        chosen = pool[:labels]
        epochs = -(-steps * batch // len(chosen))
        order = torch.cat([shuffled(chosen, generator) for _ in range(epochs)])[: steps * batch]
        part, _, size = judge.partition(":")
        return Draw(
            by_length(order, batch, self.lengths, generator), shuffled(self.parts[part], generator)[: int(size)]
        )


def by_length(order: Tensor, batch: int, lengths: Tensor | None, generator: torch.Generator) -> Tensor:
    """Batches of examples of like lengths, in random order, so that little of a batch is padding."""
    if lengths is None:
        return order
    batches = []
    for window in order.split(WINDOW * batch):
        batches += window[lengths[window].argsort(stable=True)].split(batch)
    # Each window's batches stay together, so that no epoch runs into the next.
    starts = range(0, len(batches), WINDOW)
    windows = [batches[start : start + WINDOW] for start in starts]
    mixed = [window[i] for window in windows for i in torch.randperm(len(window), generator=generator).tolist()]
    return torch.cat(mixed)


def shuffled(indices: Tensor, generator: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)]


def divided(count: int) -> dict[str, Tensor]:
    """The parts of ``count`` examples, by :data:`SHARES`, the same at every call."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    sizes = [round(share * count) for share in SHARES.values()]
    sizes[-1] = count - sum(sizes[:-1])
    return dict(zip(SHARES, order.split(sizes), strict=True))
