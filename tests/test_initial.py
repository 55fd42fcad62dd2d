"""How an update starts, and what warns of a start that bodes ill."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from snell import SnellLinear, functional, initial
from snell.spec import DEFAULT_SCALES, Spec


def empty(spec: Spec, m: int = 30, n: int = 20):
    """Factors that hold NaN: whatever a start leaves out is seen."""
    A, B = torch.full((n, spec.rank), torch.nan), torch.full((m, spec.rank), torch.nan)
    return A, B, torch.full((spec.num_theta,), torch.nan)


def test_factors_are_uniform_within_the_published_bounds() -> None:
    spec = Spec(8, 0.9, groups=2)
    A, B, theta = empty(spec, 300, 200)
    initial.draw(A, B, theta, spec, 3.0)
    for factor in (A, B):
        bound = math.sqrt(2 / factor.numel())
        assert factor.abs().max() <= bound
        # Uniform: of 1600 numbers the extremes reach the bound, and the mean magnitude is half of it.
        assert factor.max() > 0.97 * bound
        assert factor.min() < -0.97 * bound
        assert factor.abs().mean() == pytest.approx(bound / 2, rel=0.1)
    assert theta.tolist() == [3.0, -3.0]


@pytest.mark.parametrize("kernel", ["linear", "sigmoid"])
def test_the_identity_start_is_zero_and_has_a_gradient(kernel) -> None:
    spec = Spec(8, 0.0, kernel)
    A, B, theta = empty(spec)
    assert initial.draw_identity(A, B, theta, spec, 0.1) is None
    assert A.abs().min() > 0
    assert A.abs().max() <= math.sqrt(2 / A.numel())
    leaves = [t.requires_grad_() for t in (A, B, theta)]
    dW = functional.dense(functional.update(*leaves, spec))
    assert not dW.any()
    (grad_B,) = torch.autograd.grad(dW, B, torch.randn_like(dW))
    assert grad_B.abs().min() > 0


@pytest.mark.parametrize("kernel", ["piecewise_linear", "rbf"])
def test_the_visible_start_is_large_but_no_entry_exceeds_one_half(kernel) -> None:
    spec = Spec(8, 0.9, kernel)
    A, B, theta = empty(spec)
    initial.draw_visible(A, B, theta, spec, 3.0)
    largest = functional.merge(A, B, theta, torch.zeros(()), kernel=kernel, groups=2, gate="none").abs().max()
    # Halving both factors halves a distance and quarters its square: more than an eighth is left.
    assert 0.5 / 8 < largest <= 0.5
    assert theta.tolist() == torch.tensor(spec.initial_theta(3.0)).tolist()


def test_the_relative_size_of_a_start_is_that_of_all_its_entries() -> None:
    spec = Spec(8, 0.9)
    A, B, theta = empty(spec, 1100, 700)
    initial.draw(A, B, theta, spec, 3.0)
    weight = torch.zeros(1100, 700)
    weight[300:] = 0.01  # of which the first rows say nothing
    dW = functional.dense(functional.update(A, B, theta, spec))
    expected = float(dW.norm() / weight.norm())
    assert initial.relative_size(A, B, theta, spec, weight) == pytest.approx(expected, rel=0.2)
    assert initial.relative_size(A, B, theta, spec, torch.zeros_like(weight)) == 0


def test_a_start_larger_than_its_weight_warns_whoever_asked_for_it() -> None:
    linear = nn.Linear(20, 30)
    with torch.no_grad():
        linear.weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"larger than the weight in 1 of 1 .* A scale below 3 ") as warned:
        SnellLinear.from_linear(linear, rank=4)
    assert [one.filename for one in warned] == [__file__]


def test_a_scale_of_its_own_is_the_one_named() -> None:
    with pytest.warns(UserWarning, match=r"2 of 3 layer.* in b .* about 3 times .* A scale below 0\.5 "):
        initial.warn_if_large({"a": 2.0, "b": 3.0, "c": 1.0}, 0.5)


def test_an_update_without_an_entry_to_train_warns_and_names_the_sparsity_that_leaves_one() -> None:
    m, n = 10, 20
    with pytest.warns(UserWarning, match="no entry to train") as warned:
        SnellLinear(n, m, rank=4, sparsity=1 - 1e-9)
    most = float(str(warned[0].message).split("at most ")[1].split()[0])
    assert Spec(4, most).num_zeroed(m * n) == m * n - 1
    assert Spec(4, math.nextafter(most, 1)).num_zeroed(m * n) == m * n
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SnellLinear(n, m, rank=4, sparsity=most)


def test_the_default_scale_is_that_of_the_gate_that_applies() -> None:
    assert [Spec(4, 0.9, gate=gate).default_scale for gate in DEFAULT_SCALES] == list(DEFAULT_SCALES.values())
    assert Spec(4, 0.0, gate="soft").default_scale == DEFAULT_SCALES["none"]
