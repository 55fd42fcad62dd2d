"""The operations: one schema, fake and gradient each; backends register what runs them.

``snell.reference`` is the definition of each. Shapes: factors ``A [n, r]``, ``B [m, r]``, scalar
parameters ``theta [t]`` and threshold ``tau []`` in float32 or float64; ``x [..., n]``, ``weight
[m, n]``, ``bias [m]``, ``y [..., m]`` in one dtype of float64, float32, bfloat16, float16, or weight
and bias in another float dtype than x. Arguments are checked above, in :mod:`snell.functional`.

A rectangular block of the update is the update of the sliced factors, so the block operations need no
offsets: rows r0:r1 and columns c0:c1 of dW are what ``A[c0:c1]`` and ``B[r0:r1]`` merge into.

===================  ==============================================================================
select_threshold     tau, exact, of the whole matrix
merge_out            write dW (or weight + dW) of a block into ``out``, in its dtype; strided rows are fine
factor_grad          add a block's share of dA, dB and dtheta, given its G = dY^T X; in the same pass,
                     write weight + dW into ``merged`` (which may be G itself)
merge                dW or weight + dW, whole, differentiable
merge_backward       its gradients of the factors and theta
linear               y = x (W0 + dW)^T + bias, differentiable, nothing of size m*n kept; y = x dW^T where
                     there is no weight (a base that cannot be added to: quantised, several adapters)
linear_backward      its gradients, those that are asked for
===================  ==============================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from snell import schedule

LIBRARY = torch.library.Library("snell", "DEF")

_UPDATE = "str kernel, int groups, str gate"
_FACTORS = "Tensor A, Tensor B, Tensor theta, Tensor tau"

for _schema in (
    "select_threshold(Tensor A, Tensor B, Tensor theta, float sparsity, str kernel, int groups) -> Tensor",
    f"merge_out({_FACTORS}, Tensor? weight, Tensor(a!) out, {_UPDATE}) -> ()",
    f"factor_grad(Tensor G, {_FACTORS}, Tensor? weight, Tensor(a!)? merged, Tensor(b!) grad_A, Tensor(c!) grad_B,"
    f" Tensor(d!) grad_theta, {_UPDATE}) -> ()",
    f"merge({_FACTORS}, Tensor? weight, {_UPDATE}) -> Tensor",
    f"merge_backward(Tensor G, {_FACTORS}, {_UPDATE}) -> (Tensor, Tensor, Tensor)",
    f"linear(Tensor x, Tensor? weight, Tensor? bias, {_FACTORS}, {_UPDATE}) -> Tensor",
    f"linear_backward(Tensor grad_y, Tensor? x, Tensor? weight, {_FACTORS}, {_UPDATE}, bool need_x, bool need_weight,"
    " bool need_bias, bool need_factors) -> Tensor[]",
):
    LIBRARY.define(_schema)

LIBRARY.impl("linear", schedule.linear_forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_backward", schedule.linear_backward, "CompositeExplicitAutograd")
LIBRARY.impl("merge", schedule.merge, "CompositeExplicitAutograd")
LIBRARY.impl("merge_backward", schedule.factor_gradients, "CompositeExplicitAutograd")


# tau is constant for autograd: its operation passes the Autograd key by, and no output asks for a gradient.
LIBRARY.impl("select_threshold", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("snell::select_threshold")
def _(A, B, theta, sparsity, kernel, groups):
    return A.new_empty(())


@torch.library.register_fake("snell::merge_out")
def _(A, B, theta, tau, weight, out, kernel, groups, gate):
    return None


@torch.library.register_fake("snell::factor_grad")
def _(G, A, B, theta, tau, weight, merged, grad_A, grad_B, grad_theta, kernel, groups, gate):
    return None


@torch.library.register_fake("snell::merge")
def _(A, B, theta, tau, weight, kernel, groups, gate):
    return (A if weight is None else weight).new_empty(B.shape[0], A.shape[0])


@torch.library.register_fake("snell::merge_backward")
def _(G, A, B, theta, tau, kernel, groups, gate):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (A, B, theta))


@torch.library.register_fake("snell::linear")
def _(x, weight, bias, A, B, theta, tau, kernel, groups, gate):
    return x.new_empty(*x.shape[:-1], B.shape[0])


@torch.library.register_fake("snell::linear_backward")
def _(grad_y, x, weight, A, B, theta, tau, kernel, groups, gate, need_x, need_weight, need_bias, need_factors):
    grads = [grad_y.new_empty(*grad_y.shape[:-1], A.shape[0])] if need_x else []
    grads += [torch.empty_like(weight)] if need_weight else []
    grads += [(grad_y if weight is None else weight).new_empty(B.shape[0])] if need_bias else []
    return grads + (
        [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (A, B, theta)] if need_factors else []
    )


def _merge_setup(ctx, inputs, output):
    A, B, theta, tau, weight, ctx.kernel, ctx.groups, ctx.gate = inputs
    ctx.save_for_backward(A, B, theta, tau)
    ctx.weight_dtype = None if weight is None else weight.dtype


def _merge_backward(ctx, G):
    A, B, theta, tau = ctx.saved_tensors
    grads = (None, None, None)
    if any(ctx.needs_input_grad[:3]):
        grads = torch.ops.snell.merge_backward.default(G, A, B, theta, tau, ctx.kernel, ctx.groups, ctx.gate)
    grad_weight = G.to(ctx.weight_dtype) if ctx.needs_input_grad[4] else None
    return *grads, None, grad_weight, None, None, None


torch.library.register_autograd("snell::merge", _merge_backward, setup_context=_merge_setup)


def _nothing_listens(lead: Tensor) -> bool:
    """Whether the dispatcher would only hand a call on to its function: plain tensors, no mode, not compiled.

    Raises:
        NotImplementedError: under a transform of torch.func.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("snell does not work under torch.func (vmap, grad, jvp ...); use torch.autograd")
    return (
        type(lead) in (Tensor, Parameter)
        and not lead.is_meta
        and not is_in_torch_dispatch_mode()
        and not torch.compiler.is_compiling()
    )


def _below_autograd(operation, function, lead, *args):
    """The operation; at once the function behind it where nothing listens, a dispatch cheaper."""
    if _nothing_listens(lead):
        return function(lead, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return operation(lead, *args)


def select_threshold(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int) -> Tensor:
    """``snell::select_threshold``, a dispatch cheaper where nothing listens."""
    operation = torch.ops.snell.select_threshold.default
    if _nothing_listens(A):
        operation = schedule.backend_of(A.device).select_threshold
    return operation(A, B, theta, sparsity, kernel, groups)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        x, weight, _, A, B, theta, tau, ctx.kernel, ctx.groups, ctx.gate = inputs
        _, need_weight, _, need_A, need_B, need_theta = ctx.needs_input_grad[:6]
        # x serves the gradients of the factors and the weight alone: a layer that trains neither keeps no activation.
        kept_x = x if need_weight or need_A or need_B or need_theta else None
        ctx.save_for_backward(kept_x, weight, A, B, theta, tau)
        return _below_autograd(torch.ops.snell.linear.default, schedule.linear_forward, *inputs)

    @staticmethod
    def backward(ctx, grad_y):
        # The decorator costs a small layer a noticeable moment, and says nothing where no graph is asked for.
        return (_refuse_twice if torch.is_grad_enabled() else _linear_gradients)(ctx, grad_y)


def _linear_gradients(ctx, grad_y):
    x, weight, A, B, theta, tau = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_B, need_theta = ctx.needs_input_grad[:6]
    need_factors = need_A or need_B or need_theta
    update = (A, B, theta, tau, ctx.kernel, ctx.groups, ctx.gate)
    needs = (need_x, need_weight, need_bias, need_factors)
    found = _below_autograd(
        torch.ops.snell.linear_backward.default, schedule.linear_backward, grad_y, x, weight, *update, *needs
    )
    grad_A, grad_B, grad_theta = found[-3:] if need_factors else (None, None, None)
    rest = iter(found)
    return (
        next(rest) if need_x else None,
        next(rest) if need_weight else None,
        next(rest) if need_bias else None,
        grad_A if need_A else None,
        grad_B if need_B else None,
        grad_theta if need_theta else None,
        *(None,) * 4,
    )


_refuse_twice = once_differentiable(_linear_gradients)


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor,
    kernel: str,
    groups: int,
    gate: str,
) -> Tensor:
    """``snell::linear`` on its Autograd key. Eager callers may call it as a function, a dispatch cheaper."""
    inputs = (x, weight, bias, A, B, theta, tau, kernel, groups, gate)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:6]):
        return _Linear.apply(*inputs)
    return _below_autograd(torch.ops.snell.linear.default, schedule.linear_forward, *inputs)


# By hand: what register_autograd builds parses the schema at every call, which costs a small layer as much as its work.
LIBRARY.impl("linear", linear, "Autograd")


def _no_second_order(ctx, *grads):
    raise RuntimeError("snell is differentiable once: its gate and threshold count as constants in backward")


torch.library.register_autograd("snell::merge_backward", _no_second_order)
