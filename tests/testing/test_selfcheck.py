"""The self-check finds each operation that is wrong, and names it."""

from __future__ import annotations

import pytest
import torch

from snell import backends, blocks, native, reference
from snell.backends.blocked import BlockedBackend
from snell.testing import bounds, cases, selfcheck
from snell.testing.selfcheck import Checked
from snell.update import Activations

TRITON = backends.AVAILABLE.get("triton")


def wrong(checked: list[Checked]) -> set[str]:
    return {one.operation for one in checked if not one.ok}


def test_the_thinned_settings_hold_every_pair():
    every, thinned = cases.settings(False), cases.settings(True)
    assert len(every) == len(set(every)) == 80
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(s[i], s[j]) for s in thinned} == {(s[i], s[j]) for s in every}


def test_a_larger_merge_is_found(monkeypatch):
    right = BlockedBackend.merge

    def larger(self, update, weight, out):
        right(self, update, weight, out)
        out.mul_(1.001)

    monkeypatch.setattr(BlockedBackend, "merge", larger)
    assert {"merge", "factor gradients", "linear, forward", "x dW^T, both ways"} <= wrong(
        selfcheck.check("blocked", "cpu", True)
    )


@pytest.mark.parametrize("factor", ["A", "B", "theta"])
def test_a_larger_gradient_is_found(monkeypatch, factor):
    right = BlockedBackend.factor_grad

    def larger(self, G, update, grads, *rest):
        right(self, G, update, grads, *rest)
        getattr(grads, factor).mul_(1.001)

    monkeypatch.setattr(BlockedBackend, "factor_grad", larger)
    assert {"factor gradients", "linear, backward", "x dW^T, both ways"} <= wrong(
        selfcheck.check("blocked", "cpu", True)
    )


def test_one_wrong_survivor_is_found(monkeypatch):
    def select_next_larger(self, A, B, theta, spec, k, smooth_max):
        K = reference.kernel_matrix(A, B, theta, kernel=spec.kernel, groups=spec.groups, smooth_max=smooth_max)
        return K.abs().flatten().kthvalue(k + 1).values

    monkeypatch.setattr(BlockedBackend, "select", select_next_larger)
    assert {"select", "survivors"} <= wrong(selfcheck.check("blocked", "cpu", True))


def test_one_wrong_entry_is_found(monkeypatch):
    right = BlockedBackend.merge

    def one_dropped(self, update, weight, out):
        right(self, update, weight, out)
        survivors = (out if weight is None else out - weight).nonzero()
        if update.spec.gate != "none" and len(survivors):
            i, j = survivors[0].tolist()
            out[i, j] = 0 if weight is None else weight[i, j]

    monkeypatch.setattr(BlockedBackend, "merge", one_dropped)
    assert "survivors" in wrong(selfcheck.check("blocked", "cpu", True))


def test_a_wrong_product_is_found(monkeypatch):
    forward = blocks.linear_forward
    monkeypatch.setattr(blocks, "linear_forward", lambda *args: forward(*args) * 1.01)
    assert {"linear, forward"} <= wrong(selfcheck.check("blocked", "cpu", True))


@pytest.mark.skipif("cpu" not in backends.AVAILABLE, reason="the native library was not built")
def test_the_gradients_of_survivors_are_checked(monkeypatch):
    right = native.factor_grad

    def larger(update, grads, G, *matrices):
        right(update, grads, G, *matrices)
        if isinstance(G, Activations):
            grads.A.mul_(1.001)

    monkeypatch.setattr(native, "factor_grad", larger)
    assert wrong(selfcheck.check("cpu", "cpu", True)) == {"gradients of survivors"}


@pytest.mark.skipif(TRITON is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_the_path_for_few_tokens_is_checked(monkeypatch):
    monkeypatch.setattr(selfcheck, "settings", lambda thinned: [cases.Setting("rbf", "soft", torch.float32)])
    assert wrong(selfcheck.check("triton", "cpu", True)) == set()
    few = type(TRITON).few_tokens

    def larger(self, *args):
        y = few(self, *args)
        return None if y is None else y * 1.001

    monkeypatch.setattr(type(TRITON), "few_tokens", larger)
    assert wrong(selfcheck.check("triton", "cpu", True)) == {"linear, few tokens"}


@pytest.mark.skipif(TRITON is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_half_precision_gradients_of_the_kernels_need_the_bound_of_tf32(monkeypatch):
    """Without it they are out of bounds; with it they are within them."""
    halves = [cases.Setting("linear", "hard", torch.bfloat16), cases.Setting("rbf", "soft", torch.float16)]
    monkeypatch.setattr(selfcheck, "settings", lambda thinned: halves)
    assert wrong(selfcheck.check("triton", "cpu", True)) == set()
    monkeypatch.setattr(bounds, "TF32_ERROR", 0.0)
    assert "factor gradients" in wrong(selfcheck.check("triton", "cpu", True))
