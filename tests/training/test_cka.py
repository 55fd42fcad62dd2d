"""Linear CKA: invariances, the definition in float64, and digits where the change is small."""

import pytest
import torch
from torch import Tensor

from snell.training import cka, cka_importance, linear_cka


def definition(x: Tensor, y: Tensor) -> float:
    """By the Hilbert-Schmidt independence criterion of the whole matrices, in float64."""
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    K, L = (centre @ (t.double() @ t.double().T) @ centre for t in (x, y))
    return ((K * L).sum() / (K.norm() * L.norm())).item()


@pytest.mark.parametrize("rows", [2, 40, 1100])  # one tile, and several with an odd one
def test_it_is_the_definition(rows):
    x, change = torch.randn(rows, 24) + 3, torch.randn(rows, 24) * 0.5
    expected = definition(x, x + change)
    assert linear_cka(x, x + change).item() == pytest.approx(expected, abs=1e-6)
    assert cka_importance(x, change).item() == pytest.approx(1 - expected, abs=1e-6)
    assert linear_cka(x + change, x).item() == pytest.approx(expected, abs=1e-6)


def test_what_it_does_not_see():
    x = torch.randn(60, 12, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    for y in (x, -2.5 * x, x @ rotation, x + torch.randn(12, dtype=torch.float64)):
        assert linear_cka(x, y).item() == pytest.approx(1, abs=1e-12)
    assert cka_importance(x, torch.zeros_like(x)).item() == 0


def test_independent_features_have_little_in_common():
    x, y = torch.randn(2000, 10), torch.randn(2000, 10)
    assert 0 < linear_cka(x, y).item() < 0.05  # of the scale d / N


@pytest.mark.parametrize(
    ("x", "change", "expected"),
    [
        (torch.full((9, 4), 0.1), torch.full((9, 4), 0.3), 0),  # constant, and stays so
        (torch.full((9, 4), 0.1), torch.arange(36.0).view(9, 4), 1),
        (torch.arange(36.0).view(9, 4), -torch.arange(36.0).view(9, 4), 1),  # becomes constant
    ],
)
def test_it_is_defined_where_the_features_are_constant(x, change, expected):
    assert cka_importance(x, change).item() == expected


@pytest.mark.parametrize("size", [0.1, 0.01, 0.001, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_change_keeps_its_digits(size, dtype):
    x, change = torch.randn(300, 16).to(dtype), (size * torch.randn(300, 16)).to(dtype)
    exact = cka_importance(x.double(), change.double()).item()
    assert exact == pytest.approx(1 - definition(x, x.double() + change.double()), rel=1e-5, abs=1e-15)
    assert cka_importance(x, change).item() == pytest.approx(exact, rel=1e-4)
    if size < 0.01 and dtype == torch.bfloat16:  # what subtracting the outputs would give
        assert abs(cka_importance(x, (x + change) - x).item() / exact - 1) > 0.05


def test_autocast_does_not_round_its_sums():
    x, change = torch.randn(300, 16), 0.01 * torch.randn(300, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cka_importance(x, change)
    assert torch.equal(inside, cka_importance(x, change))


def test_nothing_of_the_size_of_a_gram_matrix_is_held(monkeypatch):
    monkeypatch.setattr(cka, "TILE", 16)
    x, change, largest = torch.randn(400, 300), torch.randn(400, 300), 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape not in (x.shape, x.T.shape):
                largest = max(largest, out.numel())
            return out

    with Largest():
        found = cka_importance(x, change)
    assert largest <= 16 * 300  # rows of the inputs
    assert found.item() == pytest.approx(1 - definition(x, x + change), abs=1e-6)


@pytest.mark.parametrize(
    ("x", "change"), [(torch.randn(1, 4),) * 2, (torch.randn(3, 4), torch.randn(3, 5)), (torch.randn(2, 3, 4),) * 2]
)
def test_other_shapes_are_refused(x, change):
    with pytest.raises(ValueError, match="output and change must be"):
        cka_importance(x, change)
