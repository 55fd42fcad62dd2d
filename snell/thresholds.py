"""Every threshold of a model at once, so that a training step on a GPU pays a few launches for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from snell import functional, schedule
from snell.spec import Spec

__all__ = ["refresh_thresholds"]


def _updates(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor, Spec]]:
    """Factors, theta and spec of every update in the model: a SnellLinear's, or an adapted layer's by adapter."""
    for module in model.modules():
        A: Any = getattr(module, "snell_A", None)
        layer: Any = module
        if isinstance(A, Tensor):
            yield A, layer.snell_B, layer.snell_theta, layer.spec
        elif isinstance(A, nn.ParameterDict):
            for name in A:
                theta = (layer.snell_theta if name in layer.snell_theta else layer.snell_constants)[name]
                yield A[name], layer.snell_B[name], theta, layer.snell_spec[name]


@torch.no_grad()
def refresh_thresholds(model: nn.Module) -> int:
    """Select the thresholds of all of a model's layers together; each layer then uses its own without selecting.

    Optional: a layer without a fresh threshold selects it by itself, with the same result. Call it after
    ``optimizer.step()``. A threshold is used until PyTorch counts a change of its factors. It does not count an edit
    through ``.data`` or a replayed CUDA graph that changes them: after those, call this again. Layers whose
    factors are sharded are left to select when they are gathered.

    Args:
        model: any module; layers are found however deep they sit.

    Returns:
        How many updates were selected for.
    """
    from torch.distributed.tensor import DTensor  # seconds to import, which a program without it need not pay

    together: dict[tuple, list[tuple[Tensor, Tensor, Tensor, float]]] = defaultdict(list)
    for A, B, theta, spec in _updates(model):
        if spec.sparsity and not A.is_meta and not isinstance(A, DTensor):
            key = (A.device, A.dtype, A.shape[1], spec.kernel, spec.groups)
            together[key].append((A, B, theta, spec.sparsity))
    for (device, dtype, rank, kernel, groups), updates in together.items():
        hold = getattr(schedule.BACKENDS.get(device.type), "hold_thresholds", None)
        if hold is not None and dtype == torch.float32:
            hold(updates, kernel, groups)
        else:
            for A, B, theta, sparsity in updates:
                functional.threshold(A, B, theta, Spec(rank, sparsity, kernel, groups))
    return sum(len(updates) for updates in together.values())
