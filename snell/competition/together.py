"""Selects the thresholds of a whole model at once, so that similar layers share launches on a GPU."""

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
    """Select the thresholds of all layers of a model together. The layers then use them without selecting.

    This is optional: a layer without a threshold selects one, with the same result. Call it after
    ``optimizer.step()``. If PyTorch has recorded a later change of the factors, the layer selects again. Some changes
    PyTorch cannot see: a replayed CUDA graph, an optimizer that writes through raw pointers, ``.data``. The GPU finds
    these, and the layer gives NaN instead of a wrong result until this is called again. Layers with sharded factors
    are skipped; they select when the factors are gathered. A kernel function with a softmax selects for one layer at a
    time, since each needs the smooth maxima of its columns first.

    Args:
        model: any module; layers are found at any depth.

    Returns:
        The number of updates whose thresholds were selected.
    """
    from torch.distributed.tensor import DTensor  # takes seconds to import

    together: dict[tuple, list[Parameters]] = defaultdict(list)
    for A, B, theta, spec in _parameters(model):
        if spec.sparsity and not A.is_meta and not isinstance(A, DTensor):
            together[A.device, A.dtype, spec.rank, spec.kernel, spec.groups].append((A, B, theta, spec))
    for layers in together.values():
        softmax = layers[0][3].function.softmax_of is not None
        if softmax or not hold(backends.of(layers[0][0]), layers):
            for layer in layers:
                select(*layer)
    return sum(len(layers) for layers in together.values())
