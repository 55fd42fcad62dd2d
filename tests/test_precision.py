"""Which dtype factors have, and what keeps it."""

from __future__ import annotations

import pytest
import torch

from snell import functional, precision, reference
from snell.spec import Spec

HALVES = (torch.bfloat16, torch.float16)


def test_factors_are_float64_beside_a_float64_weight_alone() -> None:
    assert precision.factor_dtype(torch.float64) == torch.float64
    assert all(precision.factor_dtype(dtype) == torch.float32 for dtype in (None, torch.float32, *HALVES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_half_precision_factor_is_widened_and_any_other_left_as_it_is(dtype) -> None:
    factor = torch.randn(5, 3).to(dtype)
    full = precision.full(factor)
    if dtype in HALVES:
        assert full.dtype == torch.float32
        assert full.to(dtype).equal(factor)
    else:
        assert full is factor


@pytest.mark.parametrize("before", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("after", [*HALVES, torch.float32, torch.float64])
def test_only_rounding_to_half_precision_is_kept_from_a_factor(before, after) -> None:
    factor = torch.randn(5, 3).to(before)
    kept = precision.keep_precision(factor, factor.to(after))
    assert kept.dtype == (before if after in HALVES and before not in HALVES else after)
    assert kept.equal(factor.to(kept.dtype))


def test_the_largest_scale_is_that_of_float32() -> None:
    largest = torch.finfo(torch.float32).max
    assert torch.tensor(Spec(4, 0.5, "linear").initial_theta(largest)).isfinite().all()
    assert torch.tensor(Spec(4, 0.5).initial_theta(largest)).abs().tolist() == [largest, largest]
    for scale in (largest * (1 + 2**-30), 1.5 * largest, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="scale must be finite in float32"):
            Spec(4, 0.5).initial_theta(scale)


def test_the_defaults_are_the_papers() -> None:
    assert Spec(4, 0.9) == Spec(4, 0.9, "piecewise_linear", 2, "soft")


def test_the_reference_takes_any_number_of_columns() -> None:
    """The rank is the factors' second dimension: 7 columns are no multiple of 2 groups, and need not be."""
    A, B, theta = torch.randn(7, 4), torch.randn(9, 4), torch.tensor([0.3, -0.3])
    x, weight = torch.randn(3, 7), torch.randn(9, 7)
    options = {"sparsity": 0.5, "kernel": "piecewise_linear", "groups": 2, "gate": "soft"}
    expected = functional.snell_linear(x, weight, None, A, B, theta, **options)
    torch.testing.assert_close(reference.snell_linear(x, weight, None, A, B, theta, **options), expected)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, None])
def test_the_compiler_is_told_the_dtype_of_the_bias_gradient(weight_dtype) -> None:
    A, B, theta, tau = torch.randn(7, 4), torch.randn(9, 4), torch.tensor([0.3, -0.3]), torch.tensor(0.1)
    weight = None if weight_dtype is None else torch.randn(9, 7).to(weight_dtype)
    grad_y, x = torch.randn(3, 9).bfloat16(), torch.randn(3, 7).bfloat16()
    args = (
        grad_y,
        x,
        weight,
        [False, False, True, False],
        A,
        B,
        theta,
        tau,
        "piecewise_linear",
        2,
        "soft",
        *[None] * 4,
    )
    (grad_bias,) = torch.ops.snell.linear_backward.default(*args)
    assert grad_bias.dtype == (weight_dtype or torch.bfloat16)
    torch.library.opcheck(torch.ops.snell.linear_backward.default, args, test_utils=("test_schema", "test_faketensor"))
