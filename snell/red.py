"""The operations of representation editing, ``z = scaling * u + bias``, as autograd and the compiler see them.

Kept for backward: ``u [..., m]``, or nothing where the scaling is not trained; never the input of the layer that gave
u. Arguments are checked in :mod:`snell.functional`; the device's backend does the work. Source: arXiv 2402.15179.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snell import backends
from snell.dispatch import nothing_listens

__all__ = ["edit"]

_LIBRARY = torch.library.Library("snell", "FRAGMENT")
_LIBRARY.define("edit(Tensor u, Tensor scaling, Tensor bias) -> Tensor")
_LIBRARY.define("edit_backward(Tensor grad, Tensor? u, Tensor scaling, bool[] needs) -> Tensor[]")


def _rows(t: Tensor, m: int) -> Tensor:
    return t.reshape(-1, m).contiguous()


def _edit(u, scaling, bias):
    m = scaling.shape[0]
    return backends.of(scaling).edit(_rows(u, m), scaling.contiguous(), bias.contiguous()).view(u.shape)


def _edit_backward(grad, u, scaling, needs):
    m = scaling.shape[0]
    u = None if u is None else _rows(u, m)
    found = backends.of(scaling).edit_backward(_rows(grad, m), u, scaling.contiguous(), tuple(needs))
    shapes = (grad.shape, scaling.shape, scaling.shape)
    return [g.view(shape) for g, shape, need in zip(found, shapes, needs, strict=True) if need]


_LIBRARY.impl("edit", _edit, "CompositeExplicitAutograd")
_LIBRARY.impl("edit_backward", _edit_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("snell::edit")
def _(u, scaling, bias):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.register_fake("snell::edit_backward")
def _(grad, u, scaling, needs):
    likes = (grad, scaling, scaling)
    contiguous = torch.contiguous_format
    return [torch.empty_like(t, memory_format=contiguous) for t, need in zip(likes, needs, strict=True) if need]


def _no_second_order(ctx, *grads):
    raise RuntimeError("snell's edit is differentiable once: use snell.reference.edit for second derivatives")


torch.library.register_autograd("snell::edit_backward", _no_second_order)


def _forward(u, scaling, bias):
    if nothing_listens(u):
        return _edit(u, scaling, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.snell.edit.default(u, scaling, bias)


class _Edit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, scaling, bias):
        ctx.save_for_backward(u if ctx.needs_input_grad[1] else None, scaling)
        return _forward(u, scaling, bias)

    @staticmethod
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad)
        u, scaling = ctx.saved_tensors
        direct = not torch.is_grad_enabled() and nothing_listens(grad) and (u is None or nothing_listens(u))
        backward = _edit_backward if direct else torch.ops.snell.edit_backward.default
        found = iter(backward(grad, u, scaling, needs))
        return tuple(next(found) if need else None for need in needs)


def _autograd(u: Tensor, scaling: Tensor, bias: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (u.requires_grad or scaling.requires_grad or bias.requires_grad):
        return _Edit.apply(u, scaling, bias)
    return _forward(u, scaling, bias)


def edit(u: Tensor, scaling: Tensor, bias: Tensor) -> Tensor:
    """``snell::edit``; its function is called directly unless compiling, which saves the dispatch."""
    return (torch.ops.snell.edit.default if torch.compiler.is_compiling() else _autograd)(u, scaling, bias)


# Not by register_autograd, whose kernel parses the schema in every call.
_LIBRARY.impl("edit", _autograd, "Autograd")
