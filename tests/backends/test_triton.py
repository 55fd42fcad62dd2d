"""What only the Triton backend has: brackets that miss, buckets that run over, groups, memory of tau, few tokens.

Under ``TRITON_INTERPRET=1``, on CPU tensors. That its operations are right is ``test_operations``' to say.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import nn

from snell import SnellLinear, backends, reference, refresh_thresholds
from snell.spec import num_zeroed

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from snell.kernels import factor_grad, few_tokens, launch, merge, selection
from snell.kernels.selection import Update, select_thresholds

PIECEWISE = ("piecewise_linear", 2)


@pytest.fixture(autouse=True)
def _on_triton():
    selection.forget()
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


def update(m, n, rank=4, sparsity=0.9) -> Update:
    return Update(torch.randn(n, rank), torch.randn(m, rank), torch.tensor([0.1, -0.13]), sparsity)


def magnitudes(u: Update) -> torch.Tensor:
    """|K| with the kernels' own bits, sorted."""
    out = torch.empty(u.B.shape[0], u.A.shape[0])
    merge.merge_out(u.A, u.B, u.theta, torch.zeros(()), None, out, *PIECEWISE, "none")
    return out.abs().flatten().sort().values


def exact(u: Update) -> torch.Tensor:
    ranked = magnitudes(u)
    return ranked[num_zeroed(u.sparsity, len(ranked)) - 1]


# --- select


@pytest.mark.parametrize("shift", [-400, 400], ids=["bracket above tau", "bracket below tau"])
@pytest.mark.parametrize("bucket", [0, 2048])
def test_a_bracket_that_misses_is_made_good(monkeypatch, shift, bucket):
    plan = selection._plan

    def wrong(m, n, sparsity):
        right = plan(m, n, sparsity)
        low, high = (900, 950) if shift < 0 else (50, 90)
        return right._replace(samples=1000, low=low, high=high, bucket=bucket)

    monkeypatch.setattr(selection, "_plan", wrong)
    u = update(37, 53, sparsity=0.5)
    assert select_thresholds([u], *PIECEWISE)[0] == exact(u)


def test_a_bucket_that_runs_over_is_made_good(monkeypatch):
    plan = selection._plan
    monkeypatch.setattr(selection, "_plan", lambda *sizes: plan(*sizes)._replace(bucket=1, low=-1, high=10**6))
    u = update(41, 50, sparsity=0.7)
    assert select_thresholds([u], *PIECEWISE)[0] == exact(u)


def test_one_pass_over_K_is_the_rule():
    """The first choice settles tau: shown by leaving out the passes after it."""
    wrong = 0
    for _ in range(6):
        u = update(60, 70, sparsity=0.8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection, "PASSES", 1)
            wrong += int(select_thresholds([u], *PIECEWISE)[0] != exact(u))
        selection.forget()
    assert wrong == 0


def test_layers_of_any_shape_share_launches_and_get_their_own_tau(launched):
    shapes = [(1, 1), (64, 512), (3, 700), (90, 31)]
    updates = [update(m, n, sparsity=s) for (m, n), s in zip(shapes, (0.9, 0.5, 0.999, 0.01), strict=True)]
    alone = []
    for u in updates:
        launched.clear()
        alone.append(select_thresholds([u], *PIECEWISE)[0])
        one = list(launched)
    selection.forget()
    launched.clear()
    together = select_thresholds(updates, *PIECEWISE)
    assert launched == one
    assert [float(t) for t in together] == [float(t) for t in alone] == [float(exact(u)) for u in updates]


def test_a_group_beyond_the_workspace_goes_in_several_calls(monkeypatch, launched):
    updates = [update(20, 30), update(30, 20), update(10, 10)]
    expected = [float(exact(u)) for u in updates]
    monkeypatch.setattr(selection, "WORKSPACE_BYTES", 1)
    assert [float(t) for t in select_thresholds(updates, *PIECEWISE)] == expected
    assert launched.count("fingerprint_kernel") == 3


def test_not_a_number_sorts_largest():
    u = update(20, 10, sparsity=0.5)
    u.B[:3] = float("nan")
    assert select_thresholds([u], *PIECEWISE)[0] == magnitudes(u)[99]
    u.B[:12] = float("nan")
    assert select_thresholds([u], *PIECEWISE)[0].isnan()


# --- what is remembered


def poison(slots: torch.Tensor) -> None:
    slots[:, 1] = slots[:, 1] >> 32 << 32 | torch.tensor(7.0).view(torch.int32).long()


@pytest.mark.parametrize("changed", ["A", "B", "theta"])
def test_tau_is_remembered_for_the_same_bits_alone(changed):
    u = update(30, 40)
    first = select_thresholds([u], *PIECEWISE)[0]
    assert first == exact(u)
    poison(selection._devices[u.A.device].memo)
    assert select_thresholds([u], *PIECEWISE)[0] == 7.0, "selected anew what was known"
    # An edit that no version counter sees.
    getattr(u, changed).data.view(-1)[-1] += 0.01
    assert select_thresholds([u], *PIECEWISE)[0] == exact(u)


def test_swapped_rows_are_other_factors():
    """A hash of values without their places would take them for the same."""
    u = update(30, 40)
    select_thresholds([u], *PIECEWISE)
    poison(selection._devices[u.A.device].memo)
    u.A.data[[0, 1]] = u.A.data[[1, 0]]
    assert select_thresholds([u], *PIECEWISE)[0] != 7.0


def test_refreshed_thresholds_are_used_until_a_factor_changes(launched):
    options = {"rank": 4, "sparsity": 0.8}
    model = nn.Sequential(SnellLinear(20, 30, **options), nn.Sequential(SnellLinear(30, 10, **options)))
    layers = [module for module in model.modules() if isinstance(module, SnellLinear)]
    apart = [layer.threshold() for layer in layers]
    selection.forget()
    launched.clear()
    assert refresh_thresholds(model) == 2
    assert launched.count("fingerprint_kernel") == 1
    launched.clear()
    assert [float(layer.threshold()) for layer in layers] == [float(tau) for tau in apart]
    assert launched == []
    with torch.no_grad():
        layers[0].snell_A.mul_(1.5)
    changed = layers[0].threshold()
    assert launched.count("fingerprint_kernel") == 1
    assert changed == exact(
        Update(*(t.detach() for t in (layers[0].snell_A, layers[0].snell_B, layers[0].snell_theta)), 0.8)
    )


# --- factor gradients and few tokens


def test_gradients_do_not_depend_on_the_bands(monkeypatch):
    u, G = update(150, 70), torch.randn(150, 70)
    tau = exact(u)

    def gradients():
        grads = [torch.zeros_like(t) for t in u[:3]]
        factor_grad.factor_grad(G, u.A, u.B, u.theta, tau, None, None, *grads, *PIECEWISE, "magnitude")
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
    u = update(3, 40, sparsity=0.5)
    room = torch.empty(2**31 + 64, dtype=torch.float16)
    far = room.as_strided((3, 40), (2**30, 1))
    far.copy_(torch.randn(3, 40))
    weight, tau = far.clone(), exact(u)
    near = torch.empty(3, 40, dtype=torch.float16)
    merge.merge_out(u.A, u.B, u.theta, tau, weight, near, *PIECEWISE, "soft")
    merge.merge_out(u.A, u.B, u.theta, tau, far, far, *PIECEWISE, "soft")
    assert far.equal(near)
    assert near.ne(weight).sum() > 0
    assert near.eq(weight).sum() >= math.ceil(0.5 * 120)
