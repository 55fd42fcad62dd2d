"""Half-precision tokens are summed in float32, and autocast leaves float64 alone."""

from __future__ import annotations

import pytest
import torch

from snell import functional

PIECEWISE = {"sparsity": 0.8, "kernel": "piecewise_linear", "groups": 2, "gate": "soft"}


def factors(m, n, dtype=torch.float32):
    return torch.randn(n, 6, dtype=dtype), torch.randn(m, 6, dtype=dtype), torch.tensor([0.3, -0.3], dtype=dtype)


def grad_bias(tokens: int, weight_dtype: torch.dtype, grad_y: torch.Tensor) -> torch.Tensor:
    m, n = grad_y.shape[1], 7
    x, weight = torch.randn(tokens, n), torch.randn(m, n).to(weight_dtype)
    bias = torch.zeros(m, dtype=weight_dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=grad_y.dtype):
        y = functional.snell_linear(x, weight, bias, *factors(m, n), **PIECEWISE)
    y.backward(grad_y)
    return bias.grad


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_bias_is_summed_in_float32(backend, weight_dtype) -> None:
    tokens, m = 5000, 9
    # Of one sign: the sum outgrows a token's gradient by more than bfloat16's 8 bits.
    grad_y = (1 + torch.rand(tokens, m)).bfloat16()
    found = grad_bias(tokens, weight_dtype, grad_y)
    assert found.dtype == weight_dtype
    expected = grad_y.double().sum(0)
    # Every order of summation in float32, and one rounding to the weight's dtype.
    bound = tokens * 2**-24 * expected
    if weight_dtype == torch.bfloat16:
        bound = bound + 2**-8 * expected
    assert ((found.double() - expected).abs() <= bound).all()


def test_float64_is_left_alone_by_autocast(backend) -> None:
    A, B, theta = (t.requires_grad_() for t in factors(9, 14, torch.float64))
    x, weight = torch.randn(5, 14, dtype=torch.float64, requires_grad=True), torch.randn(9, 14, dtype=torch.float64)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = functional.snell_linear(x, weight, None, A, B, theta, **PIECEWISE)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, A, B, theta))])
    assert results[1][0].dtype == torch.float64
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
