"""The edit's kernels: how many are launched, and strips of rows whose shares are added."""

from __future__ import annotations

import pytest
import torch
from launching import recorded

from snell import functional, waves
from snell.testing import edits
from snell.testing.bounds import assert_within

pytestmark = pytest.mark.usefixtures("on_triton")


def drawn(tokens: int, m: int):
    u, grad = torch.randn(2, tokens, m).bfloat16()
    scaling, bias = torch.randn(2, m)
    return u.requires_grad_(), scaling.clone().requires_grad_(), bias.clone().requires_grad_(), grad


@pytest.mark.parametrize("processors", [1, 2, 132])
@pytest.mark.parametrize("tokens, m", [(1, 1), (100, 130), (333, 257)])
def test_strips_of_rows_add_up_to_the_gradients(monkeypatch, tokens, m, processors):
    monkeypatch.setattr(waves, "num_processors", lambda device: processors)
    u, scaling, bias, grad = drawn(tokens, m)
    z = functional.edit(u, scaling, bias)
    found = (z.detach(), *torch.autograd.grad(z, (u, scaling, bias), grad))
    for (name, pair), actual in zip(edits.edit(u, scaling, bias, grad).items(), found, strict=True):
        assert_within(actual, *pair, name)


def test_one_launch_forward_and_two_back():
    u, scaling, bias, grad = drawn(40, 30)
    with recorded() as launched:
        functional.edit(u, scaling, bias).backward(grad)
    assert launched == ["edit_kernel", "edit_grad_kernel", "add_shares_kernel"]


def test_no_tokens_give_sums_of_zero():
    u, scaling, bias, grad = drawn(0, 30)
    functional.edit(u, scaling, bias).backward(grad)
    assert u.grad.shape == (0, 30)
    assert not scaling.grad.any()
    assert not bias.grad.any()
