"""What the published layers produced, reproduced: forward and every gradient, float32.

The published code takes tau from ``torch.quantile``, which interpolates at rank s (N - 1) of the sorted
\\|K\\| (counted from 0). Its losers are the floor(s (N - 1)) + 1 smallest entries, ours the ceil(s N) smallest:
the same, or ours lose one more, the boundary entry. The tests state which, hand the published number of
losers to the operations through ``tau``, and then leave no entry out.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from snell import functional, reference

#: Those of SNELL; tests/test_mixture.py has SNELLA's.
FILES = sorted(
    set((Path(__file__).parent / "golden").glob("*.npz")) - set(Path(__file__).parent.glob("golden/snella_*"))
)
SETTINGS = {"kernel": "piecewise_linear", "groups": 2}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request):
    with np.load(request.param) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {**tensors, "sparsity": float(tensors["sparsity"]), "theta": torch.tensor([0.1, -0.1])}


def published_losers(golden) -> int:
    entries, sparsity = golden["kappa"].numel(), golden["sparsity"]
    return math.floor(sparsity * (entries - 1)) + 1 if sparsity else 0


def published_tau(magnitudes, golden):
    losers = published_losers(golden)
    return magnitudes.flatten().kthvalue(losers).values if losers else magnitudes.new_zeros(())


def assert_close(actual, expected, name):
    error = (actual.double() - expected).norm() / expected.double().norm()
    assert error <= 1e-5, f"{name} is off by {error:.2e} relative"
    worst = (actual.double() - expected).abs().max() / expected.abs().max()
    assert worst <= 1e-5, f"{name} has an entry off by {worst:.2e} of the largest"


def test_there_are_golden_files():
    assert len(FILES) >= 4


def test_survivors_are_the_published_ones_but_for_the_boundary_entry(golden):
    A, B, theta, sparsity = golden["A"], golden["B"], golden["theta"], golden["sparsity"]
    entries = golden["kappa"].numel()
    assert golden["delta"].count_nonzero() == entries - published_losers(golden)
    more = math.ceil(sparsity * entries) - published_losers(golden)
    assert more in (0, 1)
    tau = reference.select_threshold(A, B, theta, sparsity=sparsity, **SETTINGS)
    ours = reference.merge(A, B, theta, tau, **SETTINGS, gate="magnitude" if sparsity else "none") != 0
    lost = (golden["delta"] != 0) & ~ours
    assert not (ours & (golden["delta"] == 0)).any()
    assert lost.sum() == more
    if more:
        assert golden["kappa"][lost].abs() == golden["kappa"][golden["delta"] != 0].abs().min()


def run(golden, layer, merge, tau):
    """y, dW and the gradients of x, A and B."""
    x, A, B = (golden[name].clone().requires_grad_() for name in ("x", "A", "B"))
    theta = golden["theta"]
    weight = torch.zeros(golden["kappa"].shape)
    gate = "magnitude" if golden["sparsity"] else "none"
    y = layer(x, weight, A, B, theta, tau, gate)
    grads = torch.autograd.grad(y, (x, A, B), golden["grad_y"])
    delta = merge(A, B, theta, tau, **SETTINGS, gate=gate)
    return {"y": y, "delta": delta, **dict(zip(("grad_x", "grad_A", "grad_B"), grads, strict=True))}


def test_reference_reproduces_the_published_numbers(golden):
    K = reference.kernel_matrix(golden["A"], golden["B"], golden["theta"], **SETTINGS)
    assert_close(K, golden["kappa"], "kappa")

    def layer(x, weight, A, B, theta, tau, gate):
        merged = reference.merge(A, B, theta, tau, weight=weight, **SETTINGS, gate=gate)
        return torch.nn.functional.linear(x, merged)

    for name, value in run(golden, layer, reference.merge, published_tau(K.abs(), golden)).items():
        assert_close(value, golden[name], name)


def test_operations_reproduce_the_published_numbers(golden, backend):
    K = functional.merge(golden["A"], golden["B"], golden["theta"], torch.zeros(()), **SETTINGS, gate="none")
    assert_close(K, golden["kappa"], "kappa")

    def layer(x, weight, A, B, theta, tau, gate):
        return functional.snell_linear(
            x, weight, None, A, B, theta, sparsity=golden["sparsity"], **SETTINGS, gate=gate, tau=tau
        )

    for name, value in run(golden, layer, functional.merge, published_tau(K.abs(), golden)).items():
        assert_close(value, golden[name], name)


def test_with_its_own_tau_only_the_boundary_entry_is_missing(golden, backend):
    A, B, theta, sparsity = golden["A"], golden["B"], golden["theta"], golden["sparsity"]
    gate = "magnitude" if sparsity else "none"
    x, A, B = (golden[name].clone().requires_grad_() for name in ("x", "A", "B"))
    weight = torch.zeros(golden["kappa"].shape)
    y = functional.snell_linear(x, weight, None, A, B, theta, sparsity=sparsity, **SETTINGS, gate=gate)
    grad_x, grad_A, grad_B = torch.autograd.grad(y, (x, A, B), golden["grad_y"])

    # Take the boundary entry out of the published numbers, in closed form.
    expected = {name: golden[name].double() for name in ("y", "grad_x", "grad_A", "grad_B")}
    if math.ceil(sparsity * golden["kappa"].numel()) > published_losers(golden):
        magnitudes = torch.where(golden["delta"] != 0, golden["kappa"].abs(), math.inf)
        i, j = divmod(int(magnitudes.argmin()), magnitudes.shape[1])
        delta = golden["delta"][i, j].double()
        expected["y"][:, i] -= golden["x"][:, j].double() * delta
        expected["grad_x"][:, j] -= golden["grad_y"][:, i].double() * delta
        H = (golden["grad_y"][:, i].double() @ golden["x"][:, j].double()) * golden["kappa"][i, j].abs().double()
        width = A.shape[1] // 2
        for p, alpha in enumerate((0.1, -0.1)):
            columns = slice(p * width, (p + 1) * width)
            pull = golden["B"][i, columns].double() - golden["A"][j, columns].double()
            expected["grad_B"][i, columns] -= alpha * H * pull / pull.norm()
            expected["grad_A"][j, columns] += alpha * H * pull / pull.norm()
    for name, value in (("y", y), ("grad_x", grad_x), ("grad_A", grad_A), ("grad_B", grad_B)):
        assert_close(value, expected[name], name)
