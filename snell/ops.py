"""The operations that autograd and the compiler see, each with its schema, fake and gradient.

``snell.reference`` is the definition of each. Shapes: factors ``A [n, r]``, ``B [m, r]``, scalar parameters
``theta [t]`` and threshold ``tau []`` in float32 or float64; ``x [..., n]``, ``weight [m, n]``, ``bias [m]``,
``y [..., m]`` in one dtype of float64, float32, bfloat16, float16, or weight and bias in another float dtype than x.
Arguments are checked in :mod:`snell.functional`, above; the work is done in :mod:`snell.blocks`, below.

===================  ==============================================================================
select_threshold     tau of the whole matrix, exact
merge                the whole of dW or weight + dW, differentiable
merge_backward       gradients of the factors and theta
linear               y = x (W0 + dW)^T + bias, differentiable, nothing of size m*n kept; y = x dW^T without a
                     weight (if it cannot be added to: a quantised base, several adapters)
linear_backward      the gradients that are needed
===================  ==============================================================================
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snell import blocks, competition
from snell.blocks import Needs
from snell.dispatch import nothing_listens
from snell.spec import Spec
from snell.update import Update

_LIBRARY = torch.library.Library("snell", "DEF")

_UPDATE = "Tensor A, Tensor B, Tensor theta, Tensor tau, str kernel, int groups, str gate"

#: And of the constant update that is subtracted, if there is one.
_STARTED = f"{_UPDATE}, Tensor? start_A, Tensor? start_B, Tensor? start_theta, Tensor? start_tau"

#: The smooth maxima of columns, for kernel functions with a softmax.
_MAXIMA = "Tensor? smooth_max=None, Tensor? start_smooth_max=None"

for _schema in (
    "select_threshold(Tensor A, Tensor B, Tensor theta, float sparsity, str kernel, int groups, "
    "Tensor? smooth_max=None) -> Tensor",
    f"merge(Tensor? weight, {_STARTED}, {_MAXIMA}) -> Tensor",
    f"merge_backward(Tensor G, {_UPDATE}, Tensor? smooth_max=None) -> Tensor[]",
    f"linear(Tensor x, Tensor? weight, Tensor? bias, {_STARTED}, {_MAXIMA}) -> Tensor",
    f"linear_backward(Tensor grad_y, Tensor? x, Tensor? weight, bool[] needs, {_STARTED}, {_MAXIMA}) -> Tensor[]",
):
    _LIBRARY.define(_schema)

_spec = lru_cache(Spec)


def _update(A, B, theta, tau, kernel, groups, gate, *rest):
    # tau and the gate are given, so any sparsity above 0 will do. While the compiler traces, a size may be a symbol.
    spec = _spec(int(A.shape[1]), 0.0 if gate == "none" else 0.5, kernel, groups, gate)
    # The dispatcher leaves out trailing arguments that are None.
    rest = (*rest, *(None for _ in range(6 - len(rest))))
    start = None if rest[0] is None else Update(*rest[:4], spec, smooth_max=rest[5])
    return Update(A, B, theta, tau, spec, start, rest[4])


def _flat(update: Update) -> tuple:
    """The update as the flat arguments of the schemas."""
    spec, start = update.spec, update.start
    first, first_maxima = ([None] * 4, None) if start is None else (start[:4], start.smooth_max)
    return *update[:4], spec.kernel, spec.groups, spec.gate, *first, update.smooth_max, first_maxima


def _select(A, B, theta, sparsity, kernel, groups, smooth_max=None):
    return competition.select(A, B, theta, _spec(A.shape[1], sparsity, kernel, groups), smooth_max)


def _merge(weight, *update):
    return blocks.merge(_update(*update), weight)


def _merge_backward(G, A, B, theta, tau, kernel, groups, gate, smooth_max=None):
    update = _update(A, B, theta, tau, kernel, groups, gate, *[None] * 4, smooth_max)
    return [grad for grad in blocks.factor_gradients(G, update) if grad is not None]


def _linear(x, weight, bias, *update):
    return blocks.linear_forward(x, weight, bias, _update(*update))


def _linear_backward(grad_y, x, weight, needs, *update):
    return blocks.linear_backward(grad_y, x, weight, _update(*update), Needs(*needs))


for _name, _function in (
    ("select_threshold", _select),
    ("merge", _merge),
    ("merge_backward", _merge_backward),
    ("linear", _linear),
    ("linear_backward", _linear_backward),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")

# tau is a constant for autograd: the fallthrough skips the Autograd key, so the output requires no gradient.
_LIBRARY.impl("select_threshold", torch.library.fallthrough_kernel, "Autograd")


def _empty(*tensors):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors if t is not None]


@torch.library.register_fake("snell::select_threshold")
def _(A, *_):
    return A.new_empty(())


@torch.library.register_fake("snell::merge")
def _(weight, A, B, *_):
    return (A if weight is None else weight).new_empty(B.shape[0], A.shape[0])


@torch.library.register_fake("snell::merge_backward")
def _(G, A, B, theta, *rest):
    return _empty(A, B, theta, *rest[4:])


@torch.library.register_fake("snell::linear")
def _(x, weight, bias, A, B, *_):
    return x.new_empty(*x.shape[:-1], B.shape[0])


@torch.library.register_fake("snell::linear_backward")
def _(grad_y, x, weight, needs, A, B, theta, *rest):
    smooth_max = rest[8] if len(rest) > 8 else None
    needs = Needs(*needs)
    grads = [grad_y.new_empty(*grad_y.shape[:-1], A.shape[0])] if needs.x else []
    grads += [torch.empty_like(weight)] if needs.weight else []
    grads += [(grad_y if weight is None else weight).new_empty(B.shape[0])] if needs.bias else []
    return grads + (_empty(A, B, theta, smooth_max) if needs.factors else [])


def _merge_setup(ctx, inputs, output):
    weight, *factors = inputs[:5]
    ctx.kernel, ctx.groups, ctx.gate = inputs[5:8]
    ctx.save_for_backward(*factors, inputs[12])
    ctx.weight_dtype = None if weight is None else weight.dtype


def _merge_gradients(ctx, G):
    grads = [None] * 3
    if any(ctx.needs_input_grad[1:4]):
        *factors, maxima = ctx.saved_tensors
        made = ctx.kernel, ctx.groups, ctx.gate, maxima
        grads = torch.ops.snell.merge_backward.default(G, *factors, *made)
    grad_weight = G.to(ctx.weight_dtype) if ctx.needs_input_grad[0] else None
    return grad_weight, *grads[:3], *[None] * 8, grads[3] if len(grads) > 3 else None, None


torch.library.register_autograd("snell::merge", _merge_gradients, setup_context=_merge_setup)


def _no_second_order(ctx, *grads):
    raise RuntimeError("snell is differentiable once: its gate and threshold count as constants in backward")


torch.library.register_autograd("snell::merge_backward", _no_second_order)


def select_threshold(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, smooth_max: Tensor | None = None) -> Tensor:
    """``snell::select_threshold``; called directly if nothing else listens, which saves the dispatch."""
    if nothing_listens(A):
        return competition.select(A, B, theta, spec, smooth_max)
    settings = spec.sparsity, spec.kernel, spec.groups
    return torch.ops.snell.select_threshold.default(A, B, theta, *settings, smooth_max)


def merge(weight: Tensor | None, update: Update) -> Tensor:
    """``snell::merge``."""
    return torch.ops.snell.merge.default(weight, *_flat(update))


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor:
    if nothing_listens(x):
        return blocks.linear_forward(x, weight, bias, update)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.snell.linear.default(x, weight, bias, *_flat(update))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, theta, tau, spec, start, smooth_max, of_rows):
        _, need_weight, _, need_A, need_B, need_theta = ctx.needs_input_grad[:6]
        # Only the gradients of the factors and the weight need x: a layer that trains neither keeps no activation.
        kept_x = x if need_weight or need_A or need_B or need_theta else None
        ctx.save_for_backward(kept_x, weight, A, B, theta, tau, smooth_max)
        ctx.spec, ctx.start = spec, start
        return _forward(x, weight, bias, Update(A, B, theta, tau, spec, start, smooth_max))

    @staticmethod
    def backward(ctx, grad_y):
        # once_differentiable takes noticeable time in a small layer, and is not needed if no graph is built.
        return (_refuse_twice if torch.is_grad_enabled() else _linear_gradients)(ctx, grad_y)


def _linear_gradients(ctx, grad_y):
    x, weight, A, B, theta, tau, maxima = ctx.saved_tensors
    update = Update(A, B, theta, tau, ctx.spec, ctx.start, maxima)
    need_x, need_weight, need_bias, need_A, need_B, need_theta = ctx.needs_input_grad[:6]
    needs = Needs(need_x, need_weight, need_bias, need_A or need_B or need_theta)
    if nothing_listens(grad_y):
        found = blocks.linear_backward(grad_y, x, weight, update, needs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            found = torch.ops.snell.linear_backward.default(grad_y, x, weight, list(needs), *_flat(update))
    rest = iter(found)
    grad_maxima = found.pop() if maxima is not None and needs.factors else None
    grad_A, grad_B, grad_theta = found[-3:] if needs.factors else (None, None, None)
    return (
        next(rest) if need_x else None,
        next(rest) if need_weight else None,
        next(rest) if need_bias else None,
        grad_A if need_A else None,
        grad_B if need_B else None,
        grad_theta if need_theta else None,
        None,
        None,
        None,
        grad_maxima,
        None,
    )


_refuse_twice = once_differentiable(_linear_gradients)


def _autograd(x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor:
    A, B, theta = update[:3]
    if torch.is_grad_enabled() and (
        x.requires_grad
        or A.requires_grad
        or B.requires_grad
        or theta.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias, *update[:-1])  # halves are made where blocks are
    return _forward(x, weight, bias, update)


def linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor:
    """``snell::linear``; its function is called directly unless compiling, which saves the dispatch."""
    if torch.compiler.is_compiling():
        return torch.ops.snell.linear.default(x, weight, bias, *_flat(update))
    return _autograd(x, weight, bias, update)


# Not by register_autograd, whose kernel parses the schema in every call: as much time as a small layer's work.
_LIBRARY.impl("linear", lambda x, weight, bias, *flat: _autograd(x, weight, bias, _update(*flat)), "Autograd")
