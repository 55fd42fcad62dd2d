"""The thresholds of a whole model at once, so that a training step on a GPU pays a few launches for all layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from snell import backends
from snell.competition.held import hold
from snell.competition.thresholds import select
from snell.update import Parameters

__all__ = ["refresh_thresholds"]


def _parameters(model: nn.Module) -> Iterator[Parameters]:
    for module in model.modules():
        if (parameters := getattr(module, "snell_parameters", None)) is not None:
            yield from parameters()


@torch.no_grad()
def refresh_thresholds(model: nn.Module) -> int:
    """Select the thresholds of all of a model's layers together; each layer then uses its own without selecting.

    Optional: a layer without a fresh threshold selects it by itself, with the same result. Call it after
    ``optimizer.step()``. A layer whose factors PyTorch knows to have changed since then selects again. A change that
    PyTorch cannot see (a replayed CUDA graph, an optimizer that writes through raw pointers, ``.data``) is found on
    the GPU: the layer then gives NaN rather than a wrong result, until this is called again. Layers whose factors
    are sharded are left to select when they are gathered.

    Args:
        model: any module; layers are found however deep they sit.

    Returns:
        How many updates were selected for.
    """
    from torch.distributed.tensor import DTensor  # seconds to import, which a program without it need not pay

    together: dict[tuple, list[Parameters]] = defaultdict(list)
    for A, B, theta, spec in _parameters(model):
        if spec.sparsity and not A.is_meta and not isinstance(A, DTensor):
            together[A.device, A.dtype, spec.rank, spec.kernel, spec.groups].append((A, B, theta, spec))
    for layers in together.values():
        if not hold(backends.of(layers[0][0]), layers):
            for layer in layers:
                select(*layer)
    return sum(len(layers) for layers in together.values())
