"""``SnellLinear`` as a module: what it computes, how it is made and merged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from cases import KERNELS
from interrupts import at_every_instruction
from layers import DTYPES, GATES, bits, draw, factors, settings
from snell import SnellLinear, functional, reference
from snell.merging import row_blocks

# --- what it computes


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_and_gradients_are_the_references(backend, kernel, gate):
    layer = draw(kernel=kernel, gate=gate, dtype=torch.float64, train_theta=True)
    x = torch.randn(3, 5, 14, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(t for t in factors(layer) if t.numel())]
    grad_y = torch.randn(3, 5, 9, dtype=torch.float64)
    y = layer(x)
    expected = reference.snell_linear(x, layer.weight, layer.bias, *factors(layer), **settings(layer))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    for one, other in zip(
        torch.autograd.grad(y, leaves, grad_y), torch.autograd.grad(expected, leaves, grad_y), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_threshold_delta_and_survivors_agree(backend):
    layer = draw(31, 26, dtype=torch.float64)
    delta = layer.delta_weight()
    losers = math.ceil(0.8 * (31 * 26))
    assert layer.num_survivors() == delta.count_nonzero() == 31 * 26 - losers
    assert layer.threshold() == functional.select_threshold(
        *factors(layer), sparsity=0.8, kernel="piecewise_linear", groups=2
    )
    assert layer.threshold().dtype == torch.float64
    assert layer.delta_weight(torch.bfloat16).equal(delta.bfloat16())
    torch.testing.assert_close(
        delta, reference.merge(*factors(layer), layer.threshold(), kernel="piecewise_linear", groups=2, gate="soft")
    )
    assert draw(sparsity=0.0).num_survivors() == 14 * 9
    assert draw(sparsity=0.0).threshold() == 0


def test_a_step_of_training_moves_the_threshold(backend):
    layer = draw(20, 30)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        tau = layer.threshold()
        assert tau.equal(layer.threshold())
        K = functional.merge(*factors(layer), tau, kernel="piecewise_linear", groups=2, gate="none")
        assert tau.equal(K.abs().flatten().sort().values[math.ceil(0.8 * 600) - 1])
        seen.append(tau.item())
        layer(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(seen)) == 3


def test_training_fits_a_sparse_update():
    torch.manual_seed(5)
    layer, teacher = draw(12, 10, sparsity=0.5), draw(12, 10, sparsity=0.5)
    teacher.weight.copy_(layer.weight)
    teacher.bias.copy_(layer.bias)
    optimizer = torch.optim.Adam([layer.snell_A, layer.snell_B], lr=0.03)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 12)
        loss = (layer(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


# --- construction


def test_it_starts_as_published():
    layer = SnellLinear(300, 500, rank=16, groups=4, scale=0.2)
    for factor, size in ((layer.snell_A, 300), (layer.snell_B, 500)):
        bound = 1 / math.sqrt(size * 16 / 4)
        assert factor.abs().max() <= bound
        # Uniform: the largest of thousands comes close to the bound, the mean square is a third of it.
        assert factor.abs().max() > 0.99 * bound
        assert factor.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.1)
    assert layer.snell_theta.tolist() == pytest.approx([0.2, -0.2, 0.2, -0.2])


@pytest.mark.parametrize("gate", GATES)
def test_a_fresh_update_is_small_beside_the_weight(gate):
    layer = SnellLinear(768, 768, gate=gate)
    # 0.8, 2.5 and 2 % at the default scales: hard would change a fifth of the weight at a scale of 1.
    assert 0 < layer.delta_weight().norm() < 0.05 * layer.weight.norm()
    if gate == "soft":
        assert layer.delta_weight().norm() < 0.01 * layer.weight.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_the_update_is_trained(kernel):
    layer = SnellLinear(14, 9, rank=6, kernel=kernel)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained - {"snell_theta"} == {"snell_A", "snell_B"}
    assert ("snell_theta" in trained) == (kernel in ("sigmoid", "rbf"))
    assert SnellLinear(14, 9, rank=6, kernel="rbf", train_theta=False).snell_theta.requires_grad is False
    assert SnellLinear(14, 9, rank=6, train_theta=True).snell_theta.requires_grad is True


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_float32_or_double_with_the_weight(dtype):
    layer = SnellLinear(14, 9, rank=6, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert {t.dtype for t in factors(layer)} == {expected}
    assert layer(torch.randn(3, 14).to(dtype)).dtype == dtype


def test_from_linear_shares_and_freezes():
    linear = nn.Linear(14, 9).eval()
    layer = SnellLinear.from_linear(linear, rank=6, sparsity=0.5, kernel="rbf", gate="hard", groups=3, scale=0.7)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.training
    assert (layer.in_features, layer.out_features) == (14, 9)
    assert layer.snell_theta.tolist() == pytest.approx([0.7, 1.0, -0.7])
    assert SnellLinear.from_linear(nn.Linear(14, 9, bias=False), rank=6).bias is None
    assert [SnellLinear(14, 9, rank=6, gate=gate).scale for gate in ("soft", "hard")] == [3.0, 0.1]


def test_extra_repr_tells_the_settings():
    layer = draw(kernel="sigmoid", gate="hard")
    assert "in_features=14, out_features=9, bias=True, rank=6, sparsity=0.8" in repr(layer)
    assert "kernel='sigmoid'" in repr(layer)
    assert "gate='hard'" in repr(layer)
    assert "merged" not in repr(layer)
    layer.merge()
    assert "merged" in repr(layer)


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("in_features", 0, ValueError),
        ("in_features", 1.5, ValueError),
        ("out_features", -3, ValueError),
        ("out_features", True, ValueError),
        ("rank", 7, ValueError),
        ("rank", 0, ValueError),
        ("sparsity", 1.0, ValueError),
        ("sparsity", math.nan, ValueError),
        ("kernel", "cosine", ValueError),
        ("groups", 0, ValueError),
        ("gate", "relu", ValueError),
        ("scale", "big", TypeError),
        ("scale", math.nan, ValueError),
        ("scale", math.inf, ValueError),
        ("dtype", torch.int8, TypeError),
        ("dtype", torch.complex64, TypeError),
    ],
)
def test_a_bad_setting_is_named(argument, value, error):
    good = {"in_features": 14, "out_features": 9, "rank": 6}
    with pytest.raises(error, match=argument):
        SnellLinear(**{**good, argument: value})


def test_from_linear_refuses_what_is_no_float_linear():
    with pytest.raises(TypeError, match=r"linear must be .*Conv1d"):
        SnellLinear.from_linear(nn.Conv1d(3, 3, 1))
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"linear must hold a plain floating-point weight.*int8"):
        SnellLinear.from_linear(linear, rank=2)
    quantised = nn.Linear(4, 4)  # its weight says float32, and has no memory of its own
    quantised.weight = nn.Parameter(TwoTensor(torch.zeros(4, 4), torch.zeros(4, 4)), requires_grad=False)
    with pytest.raises(TypeError, match=r"linear must hold a plain floating-point weight; got TwoTensor"):
        SnellLinear.from_linear(quantised, rank=2)
    with pytest.raises(ValueError, match="rank"):
        SnellLinear.from_linear(nn.Linear(4, 4), rank=3)


@pytest.mark.parametrize(
    "x, error",
    [
        (torch.ones(2, 13), ValueError),
        (torch.tensor(1.0), ValueError),
        (torch.ones(2, 14, dtype=torch.long), TypeError),
        (torch.ones(2, 14).double(), TypeError),
        (torch.ones(2, 14, device="meta"), ValueError),
        ([1.0] * 14, TypeError),
        (None, TypeError),
    ],
)
def test_a_bad_x_is_named(x, error):
    with pytest.raises(error, match=r"\bx must\b"):
        draw()(x)


# --- merging


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_merge_then_unmerge_is_bit_for_bit(backend, gate, dtype):
    for sparsity in (0.0, 0.8):
        layer = draw(gate=gate, dtype=dtype, sparsity=sparsity, scale=1.0)
        with torch.no_grad():
            layer.weight[torch.rand(9, 14) < 0.3] = -0.0
            layer.weight[2, 3], layer.weight[4, 5] = float("nan"), float("inf")
        base = layer.weight.clone()
        x = torch.randn(4, 14).to(dtype)
        expected = functional.merge(
            *factors(layer),
            layer.threshold(),
            weight=base,
            kernel="piecewise_linear",
            groups=2,
            gate=gate if sparsity else "none",
        )
        before = layer(x)
        layer.merge()
        layer.merge()
        assert layer.merged
        assert bits(layer.weight).equal(bits(expected))
        assert not bits(layer.weight).equal(bits(base))
        rounding = torch.finfo(dtype).eps * 64
        torch.testing.assert_close(layer(x), before, rtol=rounding, atol=rounding, equal_nan=True)
        layer.unmerge()
        layer.unmerge()
        assert not layer.merged
        assert bits(layer.weight).equal(bits(base))
        assert layer(x).nan_to_num().equal(before.nan_to_num())


def test_unmerge_survives_factors_that_change_while_merged(backend):
    layer = draw()
    base = layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        layer.snell_A.normal_()
        layer.snell_B.zero_()
    layer.unmerge()
    assert bits(layer.weight).equal(bits(base))


def test_merging_goes_by_blocks_of_rows(backend, monkeypatch):
    monkeypatch.setattr("snell.blocks.WORKSPACE_BYTES", 64 * 20 * 4)
    layer = draw(20, 200)
    base = layer.weight.clone()
    linear = layer.to_linear()
    assert layer.num_survivors() == layer.delta_weight().count_nonzero()
    layer.merge()
    assert layer.weight.equal(linear.weight)
    layer.unmerge()
    assert bits(layer.weight).equal(bits(base))


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_an_interrupt_leaves_the_weight_merged_or_not_and_says_which(sparsity, monkeypatch):
    monkeypatch.setattr("snell.blocks.WORKSPACE_BYTES", 64 * 20 * 4)
    layer = draw(20, 150, sparsity=sparsity)  # three blocks of rows
    assert len(list(row_blocks(layer._update()))) == 3
    base = layer.weight.clone()
    layer.merge()
    merged = layer.weight.clone()
    layer.unmerge()

    left = {True: 0, False: 0}
    for start, work in ((False, layer.merge), (True, layer.unmerge)):
        for instruction in at_every_instruction(work):
            assert bits(layer.weight).equal(bits(merged if layer.merged else base)), (work.__name__, instruction)
            left[layer.merged] += 1
            layer.merge() if start else layer.unmerge()
            assert bits(layer.weight).equal(bits(merged if start else base)), (work.__name__, instruction)
    assert min(left.values()) > 5


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_to_linear_is_an_ordinary_linear(backend, bias, merged):
    layer = draw(bias=bias).eval()
    x = torch.randn(4, 14)
    expected = layer(x)
    if merged:
        layer.merge()
    linear = layer.to_linear()
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    assert type(linear) is nn.Linear
    assert not linear.training
    assert (linear.bias is not None) == bias
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    assert linear.weight.data_ptr() != layer.weight.data_ptr()
    with torch.no_grad():
        linear.weight.zero_()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
