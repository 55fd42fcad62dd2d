"""The smooth maxima of K's columns as a differentiable operation, for kernel functions with a softmax.

An update takes them as one more parameter: K_ij is then a function of ``B_i``, ``A_j`` and one number, the blocks of an
update stay independent, and only survivors have gradients. What losers learn comes through this operation's backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snell import competition
from snell.spec import Spec

__all__ = ["smooth_max"]


@torch.library.custom_op("snell::smooth_max", mutates_args=())
def _smooth_max(A: Tensor, B: Tensor, theta: Tensor, kernel: str, groups: int) -> Tensor:
    return competition.smooth_max(A, B, theta, Spec(A.shape[1], 0.5, kernel, groups))


@torch.library.custom_op("snell::smooth_max_backward", mutates_args=())
def _backward(
    grad: Tensor, maxima: Tensor, A: Tensor, B: Tensor, theta: Tensor, kernel: str, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    return competition.smooth_max_backward(grad, maxima, A, B, theta, Spec(A.shape[1], 0.5, kernel, groups))


@_smooth_max.register_fake
def _(A, B, theta, kernel, groups):
    return A.new_empty(A.shape[0])


@_backward.register_fake
def _(grad, maxima, *factors_and_settings):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in factors_and_settings[:3])


def _setup(ctx, inputs, output):
    *factors, ctx.kernel, ctx.groups = inputs
    ctx.save_for_backward(output, *factors)


def _gradients(ctx, grad):
    return *_backward(grad, *ctx.saved_tensors, ctx.kernel, ctx.groups), None, None


def _no_second_order(ctx, *grads):
    raise RuntimeError("snell is differentiable once: its gate and threshold count as constants in backward")


_smooth_max.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(_no_second_order)


def smooth_max(A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Tensor | None:
    """``gamma log sum_i exp(K_ij / gamma)`` of each column, ``[n]``; None for a kernel function without a softmax."""
    return None if spec.function.softmax_of is None else _smooth_max(A, B, theta, spec.kernel, spec.groups)
