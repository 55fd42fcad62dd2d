"""What only the Triton backend has: brackets that miss, buckets that run over, groups, memory of tau, few tokens.

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
from snell.update import Gradients, Parameters, Update

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from snell.kernels import factor_grad, few_tokens, launch, merge, selection
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


# --- select


@pytest.mark.parametrize("shift", [-400, 400], ids=["bracket above tau", "bracket below tau"])
@pytest.mark.parametrize("bucket", [0, 2048])
def test_a_bracket_that_misses_is_made_good(monkeypatch, shift, bucket):
    plan = selection._plan

    def wrong(layer):
        low, high = (900, 950) if shift < 0 else (50, 90)
        return plan(layer)._replace(samples=1000, low=low, high=high, bucket=bucket)

    monkeypatch.setattr(selection, "_plan", wrong)
    layer = parameters(37, 53, sparsity=0.5)
    assert select(layer) == [exact(layer)]


def test_a_bucket_that_runs_over_is_made_good(monkeypatch):
    plan = selection._plan
    monkeypatch.setattr(selection, "_plan", lambda layer: plan(layer)._replace(bucket=1, low=-1, high=10**6))
    layer = parameters(41, 50, sparsity=0.7)
    assert select(layer) == [exact(layer)]


def test_one_pass_over_K_is_the_rule():
    """The first choice settles tau: shown by leaving out the passes after it."""
    wrong = 0
    for _ in range(6):
        layer = parameters(60, 70, sparsity=0.8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection, "PASSES", 1)
            wrong += int(select(layer) != [exact(layer)])
        selection.forget()
    assert wrong == 0


def test_layers_of_any_shape_share_launches_and_get_their_own_tau(launched):
    shapes = [(1, 1), (64, 512), (3, 700), (90, 31)]
    layers = [parameters(m, n, sparsity=s) for (m, n), s in zip(shapes, (0.9, 0.5, 0.999, 0.01), strict=True)]
    alone = []
    for layer in layers:
        launched.clear()
        alone += select(layer)
        one = list(launched)
    selection.forget()
    launched.clear()
    together = select(*layers)
    assert launched == one
    assert together == alone == [exact(layer) for layer in layers]


def test_a_group_beyond_the_workspace_goes_in_several_calls(monkeypatch, launched):
    layers = [parameters(20, 30), parameters(30, 20), parameters(10, 10)]
    expected = [exact(layer) for layer in layers]
    monkeypatch.setattr(selection, "WORKSPACE_BYTES", 1)
    assert select(*layers) == expected
    assert launched.count("fingerprint_kernel") == 3


def test_not_a_number_sorts_largest():
    layer = parameters(20, 10, sparsity=0.5)
    B = layer[1]
    B[:3] = float("nan")
    assert select(layer) == [magnitudes(layer)[99]]
    B[:12] = float("nan")
    assert math.isnan(select(layer)[0])


# --- what is remembered


def poison(slots: torch.Tensor) -> None:
    slots[:, 1] = slots[:, 1] >> 32 << 32 | torch.tensor(7.0).view(torch.int32).long()


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["A", "B", "theta"])
def test_tau_is_remembered_for_the_same_bits_alone(changed):
    layer = parameters(30, 40)
    assert select(layer) == [exact(layer)]
    poison(selection._devices[layer[0].device].memo)
    assert select(layer) == [7.0], "selected anew what was known"
    # An edit that no version counter sees.
    layer[changed].data.view(-1)[-1] += 0.01
    assert select(layer) == [exact(layer)]


def test_swapped_rows_are_other_factors():
    """A hash of values without their places would take them for the same."""
    layer = parameters(30, 40)
    A = layer[0]
    select(layer)
    poison(selection._devices[A.device].memo)
    A.data[[0, 1]] = A.data[[1, 0]]
    assert select(layer) == [exact(layer)] != [7.0]


@pytest.fixture
def refreshed(launched) -> list[SnellLinear]:
    """Layers whose thresholds were selected together; what was launched for that is not recorded."""
    options = {"rank": 4, "sparsity": 0.8}
    model = nn.Sequential(SnellLinear(20, 30, **options), nn.Sequential(SnellLinear(30, 10, **options)))
    assert refresh_thresholds(model) == 2
    assert launched.count("fingerprint_kernel") == 1
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
        assert launched.count("fingerprint_kernel") == 1
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


# --- factor gradients and few tokens


def test_gradients_do_not_depend_on_the_bands(monkeypatch):
    layer, G = parameters(150, 70), torch.randn(150, 70)
    gated = update(layer, "magnitude", exact(layer))

    def gradients():
        grads = Gradients.zeros(gated)
        factor_grad.factor_grad(G, gated, grads)
        return grads

    whole = gradients()
    monkeypatch.setattr(factor_grad, "WORKSPACE_BYTES", 1)
    for one, many, name in zip(whole, gradients(), ("grad_A", "grad_B", "grad_theta"), strict=True):
        # Three bands instead of one: sums of the same terms in another order.
        scale = one.abs().max()
        assert (one - many).abs().max() <= 64 * torch.finfo(torch.float32).eps * scale, name


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
