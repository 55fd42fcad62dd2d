"""What only a GPU would show otherwise: default devices, launches of a training step, thresholds that went stale."""

from __future__ import annotations

import pytest
import torch
from launching import parameters, recorded
from torch import nn

from snell import SnellLinear, backends, blocks, functional, refresh_thresholds, waves
from snell.kernels import fingerprint
from snell.update import Gradients

pytestmark = pytest.mark.usefixtures("on_triton")

CPU = torch.device("cpu")


def layer_and_input(tokens: int = 33, **options) -> tuple[SnellLinear, torch.Tensor]:
    with torch.device(CPU):
        layer = SnellLinear(70, 40, rank=4, **options)
        return layer, torch.randn(tokens, 70, requires_grad=True)


def step(layer: SnellLinear, x: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)
    y.backward(y.detach())
    trained = x, layer.snell_A, layer.snell_B, layer.snell_theta
    return [y.detach(), *(t.grad for t in trained if t.grad is not None), layer.threshold(), layer.delta_weight()]


@pytest.mark.parametrize("kernel", ["piecewise_linear", "linear", "sigmoid", "rbf"])
@pytest.mark.parametrize("tokens", [2, 33])
def test_no_tensor_is_made_on_the_default_device(kernel, tokens):
    """A factory call that names no device makes a tensor of another device than the factors'."""
    groups = 2 if kernel == "piecewise_linear" else 1
    layer, x = layer_and_input(tokens, kernel=kernel, groups=groups)
    G = torch.randn(40, 70)
    with torch.device("meta"):
        refresh_thresholds(nn.Sequential(layer, layer_and_input()[0]))
        found = step(layer, x)
        # Directly too: Tensor.backward runs outside the context, so a step's backward pass does not see it.
        with torch.no_grad():
            update = functional.update(layer.snell_A, layer.snell_B, layer.snell_theta, layer.spec)
            grads = Gradients.zeros(update)
            backends.of(update.A).factor_grad(G, update, grads)
        found += grads[:3]
        with torch.no_grad():
            found.append(layer(x))
    assert all(t.device == CPU for t in found)
    assert all(t.isfinite().all() for t in found)


def test_a_fingerprint_of_other_parameters_gives_NaN():
    A, B, theta, _ = parameters(30, 40, rank=10)
    tau = torch.tensor(0.5)
    state = torch.zeros((), dtype=torch.int64)
    assert fingerprint.verify(A, B, theta, tau, state).isnan()


@pytest.mark.parametrize("changed", ["snell_A", "snell_B", "snell_theta"])
def test_a_held_threshold_is_verified_in_one_launch(changed):
    layer, _ = layer_and_input(kernel="rbf", groups=1)
    refresh_thresholds(layer)
    with recorded() as launched:
        held = layer.threshold()
    assert launched == ["verify_kernel"]
    assert not held.isnan()
    getattr(layer, changed).data.view(-1)[-1] += 0.01
    assert layer.threshold().isnan()


def launches_of_a_step(monkeypatch, *, fresh: bool) -> list[str]:
    """Of a 4096 x 4096 layer in bfloat16 on a GPU of 132 multiprocessors, recorded and not run."""
    monkeypatch.setattr(waves, "num_processors", lambda device: 132)
    monkeypatch.setattr(blocks, "row_lengths", lambda *_: waves.rows(8192, 4096, 4096, 2, 132))
    monkeypatch.setattr(blocks, "column_lengths", lambda *_: waves.columns(8192, 4096, 4096, 2, 132))
    layer = SnellLinear(4096, 4096, rank=32, dtype=torch.bfloat16, bias=False)
    # One token more than few_tokens serves: with blocks cut for 8192, launches do not depend on how many.
    x = torch.randn(17, 4096, dtype=torch.bfloat16, requires_grad=True)
    with recorded(skip=True) as launched:
        if not fresh:
            refresh_thresholds(layer)
            launched.clear()
        y = layer(x)
        y.backward(torch.ones_like(y))
    return launched


def test_launches_of_a_training_step_with_a_fresh_threshold(monkeypatch):
    launched = launches_of_a_step(monkeypatch, fresh=True)
    assert "count_kernel" in launched
    assert "factor_grad_kernel" in launched
    assert len(launched) <= 12, launched


def test_launches_of_a_training_step_with_a_threshold_held(monkeypatch):
    launched = launches_of_a_step(monkeypatch, fresh=False)
    assert "verify_kernel" in launched
    assert "factor_grad_kernel" in launched
    assert len(launched) <= 6, launched
