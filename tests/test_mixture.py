"""The kernel function ``mixture``: K + alpha softmax(K / gamma) + beta, the softmax over each column (SNELLA's)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import laid_out
from snell import SnellLinear, competition, functional, reference
from snell.kernel_functions import GAMMA_LEAST
from snell.spec import Spec

MIXTURE = {"kernel": "mixture", "groups": 2}
INNER = {"kernel": "piecewise_linear", "groups": 2}
CONSTANTS = (0.5, -0.4)


def factors(m=23, n=37, r=6, dtype=torch.float32, scale=1.0):
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(k, r, generator=rng, dtype=torch.float64).mul(scale).to(dtype) for k in (n, m))


def scalars(alpha=1.0, beta=0.0, gamma=1.0, dtype=torch.float32):
    return torch.tensor([*CONSTANTS, alpha, beta, gamma], dtype=dtype)


def matrix(A, B, theta, settings=MIXTURE):
    return functional.merge(A, B, theta, theta.new_zeros(()), **settings, gate="none")


def share(A, B, gamma):
    """S, as what the softmax adds."""
    zero = matrix(A, B, scalars(0.0, 0.0, gamma, A.dtype))
    return matrix(A, B, scalars(1.0, 0.0, gamma, A.dtype)) - zero


@pytest.mark.parametrize("gamma", [1.0, 0.1, -0.5, 0.0])
def test_without_alpha_and_beta_it_is_the_inner_function_to_the_bit(gamma, backend):
    A, B = factors()
    assert matrix(A, B, scalars(0.0, 0.0, gamma)).equal(matrix(A, B, torch.tensor(CONSTANTS), INNER))


def test_a_large_gamma_spreads_the_share_evenly(backend):
    A, B = factors()
    expected = matrix(A, B, torch.tensor(CONSTANTS), INNER) + 0.7 / len(B) + 0.2
    torch.testing.assert_close(matrix(A, B, scalars(0.7, 0.2, 1e12)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("sign", "extreme"), [(1, "argmax"), (-1, "argmin")])
@pytest.mark.parametrize("size", [0.0, 1e-12, GAMMA_LEAST, 1e-5])
def test_a_small_gamma_gives_all_to_the_largest_and_is_guarded(size, sign, extreme, backend):
    A, B = factors()
    if sign < 0 and not size:
        pytest.skip("-0 counts as 0")
    S = share(A, B, sign * size)
    K = matrix(A, B, torch.tensor(CONSTANTS), INNER)
    one_hot = torch.nn.functional.one_hot(getattr(K, extreme)(0), len(B)).T
    torch.testing.assert_close(S, one_hot.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-9, 2.0**-21])
def test_gamma_below_the_guard_counts_as_the_guard(size, backend):
    A, B = (factor.mul(1e-6) for factor in factors())  # K is of gamma's order: the softmax is not one-hot
    assert matrix(A, B, scalars(gamma=size)).equal(matrix(A, B, scalars(gamma=GAMMA_LEAST)))
    assert not matrix(A, B, scalars(gamma=size)).equal(matrix(A, B, scalars(gamma=2 * GAMMA_LEAST)))
    theta = scalars(gamma=size).requires_grad_()
    (slope,) = torch.autograd.grad(matrix(A, B, theta).square().sum(), theta)
    (expected,) = torch.autograd.grad(
        matrix(A, B, other := scalars(gamma=GAMMA_LEAST).requires_grad_()).square().sum(), other
    )
    assert slope.equal(expected)
    assert slope[-1].abs() > 0  # so that training can leave the guard


@pytest.mark.parametrize(("m", "n"), [(23, 37), (37, 23), (300, 5), (5, 300), (1, 4)])
def test_the_softmax_is_over_the_outputs_of_each_input(m, n, backend):
    S = share(*factors(m, n), 0.3)
    torch.testing.assert_close(S.sum(0), torch.ones(n), rtol=0, atol=1e-5)
    if m != n and m > 1:
        assert not torch.allclose(S.sum(1), torch.ones(m), atol=1e-2)


def test_adding_a_constant_to_K_leaves_the_softmax():
    K, theta = torch.randn(7, 5, dtype=torch.float64), scalars(dtype=torch.float64)
    function = Spec(4, 0.5, **MIXTURE).function

    def softmax(K):
        from snell.kernel_functions import smooth_max

        # Two statistics of which the second has no share.
        values = function.value([K / CONSTANTS[0], torch.zeros_like(K)], theta, smooth_max(K, theta[-1]))
        return values - K

    torch.testing.assert_close(softmax(K + 100), softmax(K))
    torch.testing.assert_close(softmax(K), torch.softmax(K, 0))


@pytest.mark.parametrize("scale", [1e4, 1e15])
@pytest.mark.parametrize("gamma", [1e-5, -1.0, 3.0])
def test_a_large_K_over_gamma_does_not_overflow(scale, gamma, backend):
    A, B = factors(scale=scale)
    A, B, theta = A.requires_grad_(), B.requires_grad_(), scalars(1.0, 0.5, gamma).requires_grad_()
    K = matrix(A, B, theta)
    assert K.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(K.mean(), (A, B, theta)))


@pytest.mark.parametrize(("gate", "sparsity"), [("soft", 0.8), ("magnitude", 0.5), ("hard", 0.9), ("soft", 0.0)])
def test_gradients_by_finite_differences(gate, sparsity):
    A, B = (factor.requires_grad_() for factor in factors(7, 5, 4, torch.float64))
    trained = torch.tensor([1.3, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    constants = torch.tensor(CONSTANTS, dtype=torch.float64)
    with torch.no_grad():
        theta = torch.cat([constants, trained])
        K = reference.kernel_matrix(A, B, theta, **MIXTURE)
        # A little larger: an implementation whose K has other bits must not keep the entry that tau comes from.
        tau = reference.select_threshold(A, B, theta, sparsity=sparsity, **MIXTURE) * (1 + 1e-9)
        gates = reference.gate_values(K, tau, gate=gate if sparsity else "none")

    def gated(A, B, trained):
        # Frozen gates: finite differences do not move them.
        return reference.kernel_matrix(A, B, torch.cat([constants, trained]), **MIXTURE) * gates

    torch.autograd.gradcheck(gated, (A, B, trained))
    weights = torch.randn(7, 5, dtype=torch.float64)
    theta = torch.cat([constants, trained.detach()]).requires_grad_()
    ours = torch.autograd.grad(
        functional.merge(A, B, theta, tau, **MIXTURE, gate=gate if sparsity else "none"), (A, B, theta), weights
    )
    expected = torch.autograd.grad(gated(A, B, trained), (A, B, trained), weights)
    for actual, wanted in zip((*ours[:2], ours[2][2:]), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    assert not ours[2][:2].any()  # the constants are not trained


def test_losers_learn_through_the_softmax():
    A, B = factors(7, 5, 4, torch.float64)
    theta = scalars(gamma=0.5, dtype=torch.float64)
    tau = functional.select_threshold(A, B, theta, sparsity=0.97, **MIXTURE)
    B = B.requires_grad_()
    delta = functional.merge(A, B, theta, tau, **MIXTURE, gate="hard")
    assert delta.count_nonzero() == 1
    (grad,) = torch.autograd.grad(delta.sum(), B)
    assert (grad.abs().sum(1) > 0).all()


@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    groups=st.integers(1, 3),
    per_group=st.sampled_from([1, 3, 16]),
    sparsity=st.sampled_from([0.0, 0.5, 0.95]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    gamma=st.sampled_from([-0.5, 0.2, 1.0]),
    layout=st.sampled_from(["contiguous", "transposed"]),
)
def test_the_layer_against_the_reference(m, n, groups, per_group, sparsity, dtype, gamma, layout):
    A, B = factors(m, n, groups * per_group, dtype, 0.5)
    theta = torch.tensor([0.4 * (-1) ** p for p in range(groups)] + [0.8, 0.05, gamma], dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    weight, x, grad = (torch.randn(*size, generator=rng, dtype=dtype) for size in ((m, n), (9, n), (9, m)))
    options = {"sparsity": sparsity, "kernel": "mixture", "groups": groups, "gate": "magnitude"}
    leaves = [t.clone().requires_grad_() for t in (x, A, B, theta)]
    y = functional.snell_linear(leaves[0], laid_out(weight, layout), None, *leaves[1:], **options)
    found = torch.autograd.grad(y, leaves, grad)
    exact = [t.double().requires_grad_() for t in (x, A, B, theta)]
    tau = functional.select_threshold(A, B, theta, sparsity=sparsity, kernel="mixture", groups=groups)
    K = reference.kernel_matrix(*exact[1:], kernel="mixture", groups=groups)
    kept = functional.merge(A, B, theta, tau, kernel="mixture", groups=groups, gate="hard") != 0
    delta = K * torch.where(kept, K.detach().abs(), 0) if sparsity else K
    wanted = torch.autograd.grad(exact[0] @ (weight.double() + delta).T, exact, grad.double())
    limit = 1e-4 if dtype == torch.float32 else 1e-11
    for actual, expected in zip(found, wanted, strict=True):
        assert (actual.double() - expected).norm() <= limit * expected.norm() + 1e-6 * limit


@pytest.mark.parametrize("m", [9, 700])
def test_smooth_maxima_are_remembered_until_a_parameter_changes(m, monkeypatch):
    A, B = factors(m, 11, 4)
    theta, spec = scalars(), Spec(4, 0.5, **MIXTURE)
    first = competition.smooth_max(A, B, theta, spec)
    K = reference.kernel_matrix(A, B, theta[:2], **INNER)
    torch.testing.assert_close(first, torch.logsumexp(K, 0))
    monkeypatch.setattr(competition.columns, "_compute", None)
    assert competition.smooth_max(A, B, theta, spec).equal(first)
    monkeypatch.undo()
    theta[-1] = 0.5
    assert not competition.smooth_max(A, B, theta, spec).equal(first)
    A.data[3] += 1
    changed = competition.smooth_max(A, B, theta, spec)
    competition.forget()
    assert competition.smooth_max(A, B, theta, spec).equal(changed)


def test_compiled(backend):
    A, B = factors(8, 12, 4)
    A, B, theta = A.requires_grad_(), B.requires_grad_(), scalars().requires_grad_()
    x, weight = torch.randn(3, 12), torch.randn(8, 12)

    def step(x, A, B, theta):
        y = functional.snell_linear(x, weight, None, A, B, theta, sparsity=0.5, gate="soft", **MIXTURE)
        return torch.autograd.grad(y.sum(), (A, B, theta))

    eager = step(x, A, B, theta)
    y = torch.compile(
        lambda *t: functional.snell_linear(t[0], weight, None, *t[1:], sparsity=0.5, gate="soft", **MIXTURE),
        backend="aot_eager",
        fullgraph=True,
    )(x, A, B, theta)
    for actual, expected in zip(torch.autograd.grad(y.sum(), (A, B, theta)), eager, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("init_weights", [True, "identity"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_layer_trains_merges_and_is_saved(init_weights, sparsity):
    torch.manual_seed(0)
    base = torch.nn.Linear(20, 30)
    layer = SnellLinear.from_linear(base, rank=4, kernel="mixture", sparsity=sparsity, init_weights=init_weights)
    scale = layer.scale
    assert layer.snell_theta.tolist() == pytest.approx([scale, -scale, 1.0, 0.0, 1.0])
    x = torch.randn(50, 20)
    if init_weights == "identity":
        assert layer(x).equal(base(x))
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert layer.snell_theta[:2].tolist() == pytest.approx([scale, -scale])
    assert (layer.snell_theta[2:] != torch.tensor([1.0, 0.0, 1.0])).all()
    weight, y = layer.weight.clone(), layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert layer.weight.equal(weight)
    other = SnellLinear(20, 30, rank=4, kernel="mixture", sparsity=sparsity, init_weights=init_weights)
    other.load_state_dict(layer.state_dict())
    assert other(x).equal(y)


@pytest.fixture
def golden():
    with np.load(Path(__file__).parent / "golden" / "snella_trained_s80.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    trained = torch.cat([found["alpha"], found["beta"], found["gamma"]])
    return {**found, "theta": torch.cat([torch.tensor([0.1, -0.1]), trained])}


def assert_close(actual, expected, name):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= 1e-5, f"{name} is off by {error:.2e} relative"


@pytest.mark.parametrize("exact", [False, True])
def test_the_published_numbers(golden, backend, exact):
    """Of SNELLA's layer, forward and every gradient; its tau loses as many as it printed."""
    x, A, B, theta = (golden[name].clone().requires_grad_() for name in ("x", "A", "B", "theta"))
    losers = int((golden["delta"] == 0).sum())
    K = matrix(A.detach(), B.detach(), theta.detach())
    tau = K.abs().flatten().kthvalue(losers).values
    if exact:
        merged = reference.merge(A, B, theta, tau, **MIXTURE, gate="magnitude")
        y = x @ merged.T
    else:
        weight = torch.zeros(golden["kappa"].shape)
        y = functional.snell_linear(x, weight, None, A, B, theta, sparsity=0.8, **MIXTURE, gate="magnitude", tau=tau)
        merged = functional.merge(A, B, theta, tau, **MIXTURE, gate="magnitude")
    grad_x, grad_A, grad_B, grad_theta = torch.autograd.grad(y, (x, A, B, theta), golden["grad_y"])
    found = {"y": y, "delta": merged, "grad_x": grad_x, "grad_A": grad_A, "grad_B": grad_B, "kappa": K}
    found |= dict(zip(("grad_alpha", "grad_beta", "grad_gamma"), grad_theta[2:].split(1), strict=True))
    for name, value in found.items():
        assert_close(value, golden[name], name)
