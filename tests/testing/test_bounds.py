"""The error bounds are tight: a result that is off by a small share of itself is outside its bound.

The share is a multiple of eps. Each multiple was measured on the self-check's cases and rounded up to a power of two,
so a bound several times too wide fails here.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from snell import backends, blocks, competition, reference
from snell.backends.blocked import BlockedBackend
from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.testing.cases import DTYPES, FEW, OPERATIONS, Case, Setting
from snell.testing.selfcheck import Checked
from snell.update import Activations


class Result(NamedTuple):
    """One result of an operation of the self-check.

    Attributes:
        operation: its name in OPERATIONS.  place: the method or function that returns or writes it.  part: which of
            the place's results it is.
        full: the multiple of the factors' eps.
        half: the multiple of the activations' eps where those are in half precision; None where the result does not
            depend on their precision.
    """

    operation: str
    place: str
    part: str
    full: int
    half: int | None = None


RESULTS = [
    Result("select", "select", "tau", 512),
    Result("survivors", "select", "tau", 4),
    Result("merge", "merge", "dW", 512),
    Result("merge", "merge", "W", 4, 2),
    *(Result("factor gradients", "factor_grad", part, 1024) for part in ("A", "B")),
    Result("factor gradients", "factor_grad", "theta", 16384),
    Result("linear, forward", "linear_forward", "y", 128, 4),
    Result("linear, backward", "linear_backward", "x", 64, 4),
    *(Result("linear, backward", "linear_backward", part, 1024, 2) for part in ("A", "B")),
    Result("linear, backward", "linear_backward", "theta", 65536, 64),
    Result("x dW^T, both ways", "linear_forward", "y", 512, 4),
    Result("x dW^T, both ways", "linear_backward", "x", 512, 4),
    *(Result("x dW^T, both ways", "linear_backward", part, 1024, 2) for part in ("A", "B")),
    Result("x dW^T, both ways", "linear_backward", "theta", 65536, 64),
    Result("linear, few tokens", "few_tokens", "y", 128, 4),
    *(Result("gradients of survivors", "factor_grad_of_tokens", part, 1024, 2) for part in ("A", "B")),
    Result("gradients of survivors", "factor_grad_of_tokens", "theta", 65536, 64),
]


class Off(BlockedBackend):
    """Every ability, in plain PyTorch; the named part of one of them is too large by a share."""

    def __init__(self) -> None:
        self.place, self.part, self.share = "", "", 0.0

    def scale(self, place: str, **results: torch.Tensor) -> None:
        if place == self.place and self.part in results:
            results[self.part].mul_(1 + self.share)

    def select(self, A, B, theta, spec, k, smooth_max):
        K = reference.kernel_matrix(A, B, theta, kernel=spec.kernel, groups=spec.groups, smooth_max=smooth_max)
        tau = K.abs().flatten().kthvalue(k).values
        self.scale("select", tau=tau)
        return tau

    def merge(self, update, weight, out):
        super().merge(update, weight, out)
        self.scale("merge", **{"dW" if weight is None else "W": out})

    def factor_grad(self, G, update, grads, weight=None, merged=None):
        of_tokens = isinstance(G, Activations)
        super().factor_grad(G, update, grads, weight, merged)
        named = {part: grad for part, grad in grads._asdict().items() if grad is not None}
        self.scale("factor_grad_of_tokens" if of_tokens else "factor_grad", **named)

    def few_tokens(self, x, weight, bias, update):
        if x.shape[0] > FEW:
            return None
        built = x.new_empty(update.shape)
        super().merge(update, weight, built)
        y = torch.nn.functional.linear(x, built, bias)
        self.scale("few_tokens", y=y)
        return y

    def factor_grad_of_tokens(self, grad_y, x, update, grads, *, always=False):
        return Activations(grad_y.T, x.T) if always else None


@pytest.fixture
def off(monkeypatch):
    backend, forward, backward = Off(), blocks.linear_forward, blocks.linear_backward

    def linear_forward(*args):
        y = forward(*args)
        backend.scale("linear_forward", y=y)
        return y

    def linear_backward(*args):
        grads = backward(*args)
        named = zip(("theta", "B", "A"), reversed(grads if args[3].smooth_max is None else grads[:-1]), strict=False)
        backend.scale("linear_backward", **dict(named), x=grads[0])
        return grads

    monkeypatch.setattr(blocks, "linear_forward", linear_forward)
    monkeypatch.setattr(blocks, "linear_backward", linear_backward)
    monkeypatch.setitem(backends.AVAILABLE, "off", backend)
    with backends.use("off"):
        yield backend


def checked(operation: str, setting: Setting) -> Checked:
    competition.forget()
    result = Checked("off", "cpu", operation)
    result.add(setting, Case(setting, "cpu"), OPERATIONS[operation])
    assert result.cases == 1
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kernel", KERNEL_FUNCTIONS)
@pytest.mark.parametrize("result", RESULTS, ids=lambda result: f"{result.operation}: {result.part}")
def test_a_small_share_is_outside_the_bound(off, result, kernel, dtype):
    setting = Setting(kernel, "soft", dtype)
    assert checked(result.operation, setting).ok
    halved = dtype.itemsize == 2
    if halved and result.half is not None:
        share = result.half * torch.finfo(dtype).eps
    else:
        share = result.full * torch.finfo(torch.float32 if halved else dtype).eps
    off.place, off.part, off.share = result.place, result.part, share
    if result.part == "theta" and not KERNEL_FUNCTIONS[kernel].initial_theta(2, 1.0):
        pytest.skip("no theta")
    found = checked(result.operation, setting)
    assert not found.ok
    assert "x its bound off" in found.failures[0] or result.operation == "survivors"
