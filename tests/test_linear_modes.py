"""``SnellLinear`` in every mode it runs in: evaluation, autocast, checkpointing, accumulation, the compiler."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from layers import draw, factors
from snell import competition
from snell.dispatch import nothing_listens


def test_eval_train_no_grad_and_inference_mode_give_the_same_bits(backend):
    layer = draw()
    x = torch.randn(4, 14)
    expected = layer.train()(x)
    with torch.inference_mode():
        assert layer(x).equal(expected)
        assert not layer(x).requires_grad
        layer.snell_A.mul_(1.0)
    assert layer.eval()(x).equal(expected)
    with torch.no_grad():
        assert not layer(x).requires_grad
    # A threshold first selected under inference mode must serve training afterwards.
    with torch.no_grad():
        layer.snell_A.mul_(1.5)
    with torch.inference_mode():
        expected = layer(x)
    y = layer.train()(x)
    assert y.equal(expected)
    y.sum().backward()
    assert layer.snell_A.grad.isfinite().all()


def test_autocast_gives_bfloat16_out_and_float32_gradients(backend):
    layer = draw()
    x = torch.randn(4, 14, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.snell_A.grad.dtype == torch.float32
    grad = layer.snell_A.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert (grad - layer.snell_A.grad).norm() < 0.03 * layer.snell_A.grad.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(backend, use_reentrant, autocast):
    layers = nn.Sequential(draw(14, 9), nn.GELU(), draw(9, 14))
    x = torch.randn(4, 14, requires_grad=True)
    results = []
    for recompute in (False, True):
        layers.zero_grad()
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = checkpoint(layers, x, use_reentrant=use_reentrant) if recompute else layers(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layers.parameters() if p.requires_grad)])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def saved_bytes(layer, x):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    base = {t.untyped_storage().data_ptr() for t in layer.parameters()}
    return sum(t.nbytes for pointer, t in kept.items() if pointer not in base)


def test_a_layer_saves_x_and_tau_and_frozen_not_even_x(backend):
    layer = draw(40, 50)
    x = torch.randn(64, 40, requires_grad=True)
    tau = layer.threshold().nbytes
    assert saved_bytes(layer, x) == x.nbytes + tau
    layer.snell_A.requires_grad_(False)
    layer.snell_B.requires_grad_(False)
    assert saved_bytes(layer, x) == tau
    assert saved_bytes(layer, x.detach()) == 0


def test_factors_stored_by_columns_get_the_same_gradients():
    layer, x = draw(), torch.randn(5, 14)
    other = copy.deepcopy(layer)
    other.snell_A.data, other.snell_B.data = (t.data.t().contiguous().t() for t in (other.snell_A, other.snell_B))
    for each in (layer, other):
        each(x).square().sum().backward()
        each.delta_weight().square().sum().backward()
    for name in ("snell_A", "snell_B"):
        torch.testing.assert_close(getattr(other, name).grad, getattr(layer, name).grad)


def test_accumulated_gradients_are_the_sum(backend):
    layer = draw(dtype=torch.float64)
    x = torch.randn(8, 14, dtype=torch.float64)
    layer(x).square().sum().backward()
    whole = layer.snell_B.grad.clone()
    layer.zero_grad()
    for part in x.split(3):
        layer(part).square().sum().backward()
    torch.testing.assert_close(layer.snell_B.grad, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["piecewise_linear", "sigmoid"])
def test_under_a_dispatch_mode_the_gradients_have_the_same_bits(backend, kernel):
    """Counters of operations, and all else that watches the dispatcher, change nothing."""
    layer, x = draw(kernel=kernel, train_theta=True), torch.randn(5, 14)
    results = []
    for mode in (nullcontext(), FlopCounterMode(display=False)):
        layer.zero_grad()
        with mode:
            layer(x).square().sum().backward()
            layer.delta_weight().square().sum().backward()
        results.append([t.grad for t in factors(layer)])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


# --- the compiler


@pytest.mark.parametrize("kernel", ["piecewise_linear", "rbf"])
def test_compiles_whole_with_a_dynamic_batch(backend, kernel):
    layer = draw(kernel=kernel, train_theta=True)
    model = nn.Sequential(layer, nn.GELU())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 7, 12):
        x = torch.randn(tokens, 14, requires_grad=True)
        results = []
        for run in (model, compiled):
            layer.zero_grad()
            x.grad = None
            y = run(x)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(t.grad.clone() for t in factors(layer))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # The graph selects again: a threshold may not be baked in.
    with torch.no_grad():
        layer.snell_A.mul_(3)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_inductor_compiles_forward_and_backward_under_autocast():
    layer = draw()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(torch.ones(4, 14))
        y.float().square().sum().backward()
        results.append([y.detach(), layer.snell_A.grad.clone(), layer.snell_B.grad.clone()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_compile_saves_no_more_for_backward_than_eager_does(backend):
    """The partitioner is shown the same minimal set: x, factors, tau and the weight."""
    layer = draw(40, 50)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(64, 40, requires_grad=True)
    compiled(x).sum().backward()
    assert saved_bytes(compiled, x) <= x.nbytes + layer.threshold().nbytes


# --- what listens to the dispatcher


class Heard(TorchDispatchMode):
    """The names of the operations that are dispatched inside the context."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


def test_a_dispatch_mode_hears_the_operations():
    layer, x = draw(), torch.randn(5, 14)
    expected = layer(x)
    competition.forget()
    with Heard() as heard:
        y = layer(x)
    assert {"snell::linear", "snell::select_threshold"} <= set(heard.names)
    assert y.equal(expected)


def test_a_trace_holds_the_operations():
    layer, x = draw(), torch.randn(5, 14)
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(3, 14), check_trace=False)
        assert "snell::linear" in str(traced.inlined_graph)
        assert traced(x).equal(layer(x))


class _Subclass(torch.Tensor):
    """A tensor whose class may want to see the operations."""


def test_only_plain_tensors_that_nothing_watches_skip_the_dispatcher():
    plain = torch.zeros(2)
    assert nothing_listens(plain)
    assert nothing_listens(nn.Parameter(plain))
    assert not nothing_listens(plain.to("meta"))
    assert not nothing_listens(plain.as_subclass(_Subclass))
