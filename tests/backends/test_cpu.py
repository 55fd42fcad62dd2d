"""What the native backend has beyond the block operations: gradients straight from the activations."""

from dataclasses import replace

import pytest
import torch

from snell import backends, functional, native, reference
from snell.backends import cpu
from snell.spec import Spec
from snell.update import Gradients, Update

pytestmark = pytest.mark.skipif("cpu" not in backends.AVAILABLE, reason="the native library was not built")

KERNELS = ("piecewise_linear", "linear", "sigmoid", "rbf")


def _update(m, n, rank, kernel, groups, dtype, sparsity, gate="soft") -> Update:
    # Small factors: rbf and sigmoid would saturate, and tie, in float32.
    A, B = 0.3 * torch.randn(n, rank, dtype=dtype), 0.3 * torch.randn(m, rank, dtype=dtype)
    spec = Spec(rank, sparsity, kernel, groups, gate)
    return functional.update(A, B, torch.tensor(spec.initial_theta(0.3), dtype=dtype), spec)


def _from_tokens(grad_y, x, update: Update, grads: Gradients) -> bool:
    """Whether the backend took the products of survivors only; if so, all gradients are added."""
    backend = backends.AVAILABLE["cpu"]
    activations = backend.factor_grad_of_tokens(grad_y, x, update, grads)
    if activations is not None:
        backend.factor_grad(activations, update, grads)
    return activations is not None


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer, however small, takes the survivors' products, in slabs of a few tokens."""
    monkeypatch.setattr(cpu, "WORTH_ASKING", 0)
    monkeypatch.setattr(cpu, "SLAB_TOKENS", 37)


@pytest.mark.parametrize("gate", ["soft", "magnitude", "hard"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_gradients_from_tokens_match_the_reference(eager, dtype, tolerance, kernel, gate) -> None:
    m, n, rank, groups, tokens = 61, 83, 12, 3, 101
    update = _update(m, n, rank, kernel, groups, dtype, 0.95, gate)
    tau = update.tau
    # Rows of a longer matrix, as a batch's slice is.
    grad_y, x = torch.randn(tokens, m + 3, dtype=dtype)[:, :m], torch.randn(tokens, n + 5, dtype=dtype)[:, :n]
    grads = Gradients(*(torch.randn_like(t) for t in update[:3]))
    before = [grad.clone() for grad in grads[:3]]
    assert _from_tokens(grad_y, x, update, grads)
    exact = [t.double().requires_grad_() for t in update[:3]]
    # The same entries survive in both: the float64 K of a float32 survivor at the boundary may fall below tau.
    survive = functional.dense(update) != 0
    K = reference.kernel_matrix(*exact, kernel=kernel, groups=groups)
    a = K.detach().abs()
    gates = {"soft": (a - tau).clamp(min=0), "magnitude": a, "hard": torch.ones_like(a)}[gate] * survive
    G = (grad_y.double().T @ x.double()) * gates
    wanted = torch.autograd.grad(K, [t for t in exact if t.numel()], G)
    for name, grad, start, want in zip(("A", "B", "theta"), grads, before, wanted, strict=False):
        assert ((grad - start) - want).norm() <= tolerance * want.norm() + tolerance, name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 15, 64, 65])
def test_a_layer_gives_the_gradients_it_gives_with_G(eager, monkeypatch, tokens: int, transposed: bool) -> None:
    m, n = 70, 45
    A, B, theta = (t.requires_grad_() for t in _update(m, n, 16, "piecewise_linear", 2, torch.float64, 0.9)[:3])
    # Conv1D stores its weight transposed, and W0 + dW is written as the weight is.
    weight = torch.randn(n, m, dtype=torch.float64).t() if transposed else torch.randn(m, n, dtype=torch.float64)
    x = torch.randn(tokens, n, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(tokens, m, dtype=torch.float64)
    calls = []
    through_tokens = cpu.CpuBackend.factor_grad_of_tokens

    def counted(*args):
        activations = through_tokens(*args)
        calls.append(activations is not None)
        return activations

    monkeypatch.setattr(cpu.CpuBackend, "factor_grad_of_tokens", counted)

    def gradients():
        settings = {"sparsity": 0.9, "kernel": "piecewise_linear", "groups": 2, "gate": "soft"}
        y = functional.snell_linear(x, weight, None, A, B, theta, **settings)
        return torch.autograd.grad(y, (x, A, B, theta), grad_y)

    from_tokens = gradients()
    monkeypatch.setattr(cpu, "FEW_SURVIVORS", 0.0)
    from_G = gradients()
    assert calls == [True, False]
    for a, b in zip(from_tokens, from_G, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_it_is_left_alone_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    update = _update(64, 64, 8, "linear", 1, torch.float32, 0.95)

    def used(update, dtype=torch.float32):
        x = torch.randn(32, 64, dtype=dtype)
        return _from_tokens(x, x, update, Gradients.zeros(update))

    assert not used(update), "a small layer is not worth asking"
    monkeypatch.setattr(cpu, "WORTH_ASKING", 0)
    assert used(update)
    assert not used(update._replace(spec=replace(update.spec, gate="none")))
    assert not used(update, dtype=torch.bfloat16)
    assert not used(update._replace(tau=update.tau * 0)), "everything survives"


def test_the_share_of_survivors_is_estimated() -> None:
    for sparsity in (0.5, 0.9, 0.99):
        update = _update(300, 200, 8, "piecewise_linear", 2, torch.float32, sparsity)
        share = native.density(update, 2**14)
        # Five standard deviations of a share counted in 2^14 draws.
        assert abs(share - (1 - sparsity)) <= 5 * (sparsity * (1 - sparsity) / 2**14) ** 0.5
    assert native.density(update._replace(spec=replace(update.spec, gate="none")), 16) == 1.0
