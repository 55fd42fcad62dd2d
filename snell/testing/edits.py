"""Error bounds of the edit ``z = scaling * u + bias`` and of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from snell import reference
from snell.testing.bounds import growth, rounded

__all__ = ["edit"]


def edit(u: Tensor, scaling: Tensor, bias: Tensor, grad: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """z and the gradients of u, scaling and bias in float64, each with its bound, from ``grad`` of z's shape."""
    dtype = u.dtype
    # float64 outputs are computed in float64, whatever the vectors are.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else scaling.dtype).eps
    # Gradients are returned in the vectors' own dtype.
    last = torch.finfo(scaling.dtype).eps
    exact = tuple(t.detach().double().requires_grad_() for t in (u, scaling, bias))
    z = reference.edit(*exact)
    grad_u, grad_scaling, grad_bias = torch.autograd.grad(z, exact, grad.double())
    u, scaling, bias = (t.detach() for t in exact)
    rows, z = grad.double().reshape(-1, len(bias)).abs(), z.detach()
    sums = {
        "grad_scaling": (grad_scaling, (rows * u.reshape(rows.shape).abs()).sum(0)),
        "grad_bias": (grad_bias, rows.sum(0)),
    }
    return {
        "z": (z, rounded(z, 2 * eps * ((scaling * u).abs() + bias.abs()), dtype)),
        "grad_u": (grad_u, rounded(grad_u, eps * grad_u.abs(), dtype)),
        **{
            name: (value, growth(len(rows)) * eps * total + last * value.abs()) for name, (value, total) in sums.items()
        },
    }
