"""What tests of the kernels share: random updates, their exact threshold, and a record of what is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from snell import backends
from snell.kernels import launch
from snell.spec import Spec
from snell.update import Parameters, Update


def parameters(m: int, n: int, rank: int = 4, sparsity: float = 0.9, **options) -> Parameters:
    spec = Spec(rank, sparsity, **options)
    theta = torch.tensor(spec.initial_theta(0.1))
    return torch.randn(n, rank), torch.randn(m, rank), theta, spec


def magnitudes(layer: Parameters) -> torch.Tensor:
    """|K| with the kernels' own bits, sorted."""
    A, B, theta, spec = layer
    out = torch.empty(B.shape[0], A.shape[0])
    ungated = Spec(spec.rank, 0.0, spec.kernel, spec.groups).applied
    backends.AVAILABLE["triton"].merge(Update(A, B, theta, torch.zeros(()), ungated), None, out)
    return out.abs().flatten().sort().values


def exact(layer: Parameters) -> torch.Tensor:
    """tau by sorting."""
    ranked = magnitudes(layer)
    return ranked[layer[3].num_zeroed(len(ranked)) - 1]


@contextmanager
def recorded(*, skip: bool = False) -> Iterator[list[str]]:
    """Names of the kernels launched, in order; with ``skip`` none of them runs."""
    names: list[str] = []
    run = launch.run

    def record(kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        if not skip:
            run(kernel, *args, **kwargs)

    with mock.patch.object(launch, "run", record):
        yield names
