"""What only the Triton backend has above its kernels: thresholds held for a model, few tokens.

Under ``TRITON_INTERPRET=1``, on CPU tensors. That its operations are right is ``test_operations``' to say.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from snell import SnellLinear, backends, competition, reference, refresh_thresholds
from snell.spec import Spec
from snell.update import Parameters, Update

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from snell.kernels import few_tokens, launch, merge
from snell.kernels.selection import select_thresholds


@pytest.fixture(autouse=True)
def _on_triton():
    competition.forget()
    with backends.use("triton"):
        yield


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels launched, in order."""
    names, run = [], launch.run

    def record(kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(launch, "run", record)
    return names


def parameters(m, n, rank=4, sparsity=0.9) -> Parameters:
    return torch.randn(n, rank), torch.randn(m, rank), torch.tensor([0.1, -0.13]), Spec(rank, sparsity)


def update(layer: Parameters, gate="none", tau=0.0) -> Update:
    *factors, spec = layer
    return Update(*factors, torch.as_tensor(tau), replace(spec, gate=gate))


def select(*layers: Parameters) -> list[float]:
    return select_thresholds(layers)[0].tolist()


def magnitudes(layer: Parameters) -> torch.Tensor:
    """|K| with the kernels' own bits, sorted."""
    ungated = update(layer)
    out = torch.empty(ungated.shape)
    merge.merge(ungated, None, out)
    return out.abs().flatten().sort().values


def exact(layer: Parameters) -> float:
    ranked = magnitudes(layer)
    return ranked[layer[3].num_zeroed(len(ranked)) - 1].item()


# --- thresholds held for a model


@pytest.fixture
def refreshed(launched) -> list[SnellLinear]:
    """Layers whose thresholds were selected together; what was launched for that is not recorded."""
    options = {"rank": 4, "sparsity": 0.8}
    model = nn.Sequential(SnellLinear(20, 30, **options), nn.Sequential(SnellLinear(30, 10, **options)))
    assert refresh_thresholds(model) == 2
    launched.clear()
    return [module for module in model.modules() if isinstance(module, SnellLinear)]


def exact_of(layer: SnellLinear) -> float:
    return exact(next(layer.snell_parameters()))


def test_refreshed_thresholds_are_used_until_a_factor_changes(refreshed, launched):
    with torch.no_grad():
        held = [layer.threshold() for layer in refreshed]
        assert launched == ["verify_kernel"] * 2
        assert [float(tau) for tau in held] == [exact_of(layer) for layer in refreshed]
        first, second = refreshed
        first.snell_A.mul_(1.5)
        launched.clear()
        changed = first.threshold()
        assert launched
        assert "verify_kernel" not in launched
        assert changed == exact_of(first)
        launched.clear()
        assert second.threshold().equal(held[1])
        assert launched == ["verify_kernel"]


STALE = {
    "one number of A": lambda layer: layer.snell_A.data.view(-1)[-1:].add_(0.01),
    "one number of B": lambda layer: layer.snell_B.data[:1, :1].add_(0.01),
    "theta": lambda layer: layer.snell_theta.data[1:].add_(0.01),
    "the last bit": lambda layer: layer.snell_B.data.view(torch.int32).view(-1)[-1:].bitwise_xor_(1),
    "swapped rows": lambda layer: layer.snell_A.data.copy_(layer.snell_A.data.roll(1, 0)),
}


@pytest.mark.parametrize("edit", STALE)
def test_a_held_threshold_that_is_stale_gives_NaN_until_the_next_refresh(refreshed, launched, edit):
    """An edit through ``.data``, which no version counter sees, as an optimizer's own kernel or a graph's replay."""
    layer, other = refreshed
    version = layer.snell_A._version, layer.snell_B._version, layer.snell_theta._version
    STALE[edit](layer)
    assert version == (layer.snell_A._version, layer.snell_B._version, layer.snell_theta._version)
    with torch.no_grad():
        assert layer.threshold().isnan()
        held = other.threshold()
        assert launched == ["verify_kernel"] * 2
        assert held == exact_of(other)
        for tokens in (1, few_tokens.TOKENS + 1):
            assert layer(torch.randn(tokens, 20)).isnan().all()
    assert refresh_thresholds(nn.Sequential(layer, other)) == 2
    launched.clear()
    with torch.no_grad():
        again = layer.threshold()
        assert launched == ["verify_kernel"]
        assert again == exact_of(layer)
        assert layer(torch.randn(2, 20)).isfinite().all()


# --- few tokens


@pytest.mark.parametrize("kernel, groups", [("piecewise_linear", 3), ("sigmoid", 1)])
@pytest.mark.parametrize("tokens", [1, few_tokens.TOKENS])
@pytest.mark.parametrize("transposed", [False, True])
def test_few_tokens_multiply_in_one_pass(launched, kernel, groups, tokens, transposed):
    layer = SnellLinear(101, 70, rank=6, sparsity=0.7, kernel=kernel, groups=groups, scale=1.0)
    if transposed:
        layer.weight.data = layer.weight.data.t().contiguous().t()
    x = torch.randn(tokens, 101)
    with torch.no_grad():
        tau = layer.threshold()
        launched.clear()
        y = layer(x)
    assert "few_tokens_kernel" in launched
    assert "merge_kernel" not in launched
    A, B, theta = (t.detach().double() for t in (layer.snell_A, layer.snell_B, layer.snell_theta))
    merged = reference.merge(
        A, B, theta, tau.double(), weight=layer.weight.double(), kernel=kernel, groups=groups, gate="soft"
    )
    expected = nn.functional.linear(x.double(), merged, layer.bias.double())
    # Each y sums 101 products of float32 numbers; K is right to a few eps of its own size, which is below 1.
    bound = 101 * torch.finfo(torch.float32).eps * (x.double().abs() @ (merged.abs() + 1).T + 1)
    assert bool(((y - expected).abs() <= bound).all())


def test_more_tokens_go_by_blocks(launched):
    layer = SnellLinear(40, 30, rank=4)
    with torch.no_grad():
        layer(torch.randn(few_tokens.TOKENS + 1, 40))
    assert "few_tokens_kernel" not in launched
    assert "merge_kernel" in launched


def test_addresses_beyond_two_to_the_31():
    """Rows 2^30 numbers apart; only their own pages are ever touched."""
    layer = parameters(3, 40, sparsity=0.5)
    gated = update(layer, "soft", exact(layer))
    room = torch.empty(2**31 + 64, dtype=torch.float16)
    far = room.as_strided((3, 40), (2**30, 1))
    far.copy_(torch.randn(3, 40))
    weight = far.clone()
    near = torch.empty(3, 40, dtype=torch.float16)
    merge.merge(gated, weight, near)
    merge.merge(gated, far, far)
    assert far.equal(near)
    assert near.ne(weight).sum() > 0
    assert near.eq(weight).sum() >= math.ceil(0.5 * 120)
