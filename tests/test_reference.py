"""The definition itself, against the formulas written out an entry at a time."""

import math

import pytest
import torch

from cases import KERNELS
from snell import reference
from snell.spec import GATES, Spec


def kappa(b, a, theta, kernel, groups):
    """One entry of K from the method's table, in Python floats."""

    def norm(u, v):
        return math.sqrt(sum((s - t) ** 2 for s, t in zip(u, v, strict=True)))

    dot = sum(s * t for s, t in zip(b, a, strict=True))
    if kernel == "piecewise_linear":
        width = len(a) // groups
        return sum(
            theta[p] * norm(b[p * width : (p + 1) * width], a[p * width : (p + 1) * width]) for p in range(groups)
        )
    if kernel == "linear":
        return dot
    alpha, beta, gamma = theta
    if kernel == "sigmoid":
        return alpha / (1 + math.exp(-beta * dot)) + gamma
    return alpha * math.exp(-beta * norm(b, a) ** 2) + gamma


def gate_of(k, tau, gate):
    a = abs(k)
    return {
        "soft": max(a - tau, 0.0),
        "magnitude": a if a > tau else 0.0,
        "hard": 1.0 if a > tau else 0.0,
        "none": 1.0,
    }[gate]


def draw(kernel, groups=3, m=7, n=9, rank=6, dtype=torch.float64):
    theta = Spec(rank, 0.5, kernel, groups).initial_theta(0.4)
    noise = 1 + 0.3 * torch.rand(len(theta), dtype=dtype)
    return torch.randn(n, rank, dtype=dtype), torch.randn(m, rank, dtype=dtype), torch.tensor(theta).to(dtype) * noise


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_matrix_is_kappa_of_every_pair(kernel, groups):
    A, B, theta = draw(kernel, groups)
    K = reference.kernel_matrix(A, B, theta, kernel=kernel, groups=groups)
    for i, b in enumerate(B.tolist()):
        for j, a in enumerate(A.tolist()):
            assert K[i, j].item() == pytest.approx(kappa(b, a, theta.tolist(), kernel, groups), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("gate", GATES)
def test_merge_is_K_times_its_gate(gate):
    A, B, theta = draw("piecewise_linear")
    settings = {"kernel": "piecewise_linear", "groups": 3}
    tau = reference.select_threshold(A, B, theta, sparsity=0.6, **settings)
    K = reference.kernel_matrix(A, B, theta, **settings)
    assert tau == sorted(K.abs().flatten().tolist())[math.ceil(0.6 * 63) - 1]
    expected = torch.tensor(
        [[k * gate_of(k, tau.item(), gate) for k in row] for row in K.tolist()], dtype=torch.float64
    )
    merged = reference.merge(A, B, theta, tau, **settings, gate=gate)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=0)
    assert merged.count_nonzero() == (63 if gate == "none" else 63 - math.ceil(0.6 * 63))
    weight = torch.randn(7, 9).bfloat16()
    added = reference.merge(A, B, theta, tau, weight=weight, **settings, gate=gate)
    assert added.equal((weight.double() + merged).bfloat16())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_K_with_the_gate_held(kernel, gate):
    A, B, theta = (t.requires_grad_() for t in draw(kernel))
    settings = {"kernel": kernel, "groups": 3}
    tau = reference.select_threshold(A, B, theta, sparsity=0.5, **settings)
    G = torch.randn(7, 9, dtype=torch.float64)
    merged = reference.merge(A, B, theta, tau, **settings, gate=gate)
    leaves = (A, B, theta) if theta.numel() else (A, B)
    actual = torch.autograd.grad(merged, leaves, G)

    K = reference.kernel_matrix(A, B, theta, **settings).detach()
    held = torch.tensor([[gate_of(k, tau.item(), gate) for k in row] for row in K.tolist()], dtype=torch.float64)
    step = 1e-6
    for position, (leaf, grad) in enumerate(zip(leaves, actual, strict=True)):
        for index in [(0,) * leaf.dim(), tuple(s - 1 for s in leaf.shape)]:
            sides = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in (A, B, theta)]
                moved[position][index] += sign * step
                sides.append((reference.kernel_matrix(*moved, **settings) * held * G).sum())
            assert grad[index].item() == pytest.approx(((sides[0] - sides[1]) / (2 * step)).item(), rel=1e-6, abs=1e-8)


def test_piecewise_gradients_are_the_closed_form():
    A, B, theta = (t.requires_grad_() for t in draw("piecewise_linear", groups=2))
    settings = {"kernel": "piecewise_linear", "groups": 2}
    tau = reference.select_threshold(A, B, theta, sparsity=0.5, **settings)
    G = torch.randn(7, 9, dtype=torch.float64)
    merged = reference.merge(A, B, theta, tau, **settings, gate="soft")
    grad_A, grad_B, grad_theta = torch.autograd.grad(merged, (A, B, theta), G)
    K = reference.kernel_matrix(A, B, theta, **settings)
    H = G * (K.abs() - tau).clamp(min=0)
    with torch.no_grad():
        for p in range(2):
            columns = slice(3 * p, 3 * p + 3)
            a, b = A[:, columns], B[:, columns]
            norm = (b.unsqueeze(1) - a).square().sum(-1).sqrt()
            C = theta[p] * H / norm
            torch.testing.assert_close(grad_B[:, columns], C.sum(1, keepdim=True) * b - C @ a)
            torch.testing.assert_close(grad_A[:, columns], C.sum(0).unsqueeze(1) * a - C.T @ b)
            torch.testing.assert_close(grad_theta[p], (H * norm).sum())


@pytest.mark.parametrize("kernel", ["piecewise_linear", "rbf"])
def test_the_gradient_where_a_distance_is_zero_is_zero(kernel):
    A, B, theta = draw(kernel, groups=1, m=1, n=1)
    A = B.clone().requires_grad_()
    K = reference.kernel_matrix(A, B, theta, kernel=kernel, groups=1)
    (grad,) = torch.autograd.grad(K.sum(), A)
    assert grad.equal(torch.zeros_like(grad))


def test_without_sparsity_the_update_is_K():
    A, B, theta = draw("sigmoid")
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 9), (7, 9), (7,)))
    settings = {"kernel": "sigmoid", "groups": 3}
    assert reference.select_threshold(A, B, theta, sparsity=0.0, **settings) == 0
    y = reference.snell_linear(x, weight, bias, A, B, theta, sparsity=0.0, **settings, gate="hard")
    K = reference.kernel_matrix(A, B, theta, **settings)
    torch.testing.assert_close(y, x @ (weight + K).T + bias)


@pytest.mark.parametrize("gate", GATES)
def test_nan_is_never_a_loser(gate):
    K = torch.tensor([0.1, float("nan"), 5.0])
    assert reference.gate_values(K, torch.tensor(1.0), gate=gate).isnan().tolist() == [False, gate != "none", False]


def test_unknown_kernel_function_is_named():
    with pytest.raises(ValueError, match=r"kernel.*gauss"):
        reference.kernel_matrix(torch.ones(2, 2), torch.ones(2, 2), torch.ones(3), kernel="gauss", groups=1)


def test_half_precision_factors_are_computed_in_float32():
    A, B, theta = (t.bfloat16() for t in draw("piecewise_linear"))
    K = reference.kernel_matrix(A, B, theta, kernel="piecewise_linear", groups=3)
    assert K.dtype == torch.float32
    assert K.equal(reference.kernel_matrix(A.float(), B.float(), theta.float(), kernel="piecewise_linear", groups=3))
