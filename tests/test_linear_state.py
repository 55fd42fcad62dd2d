"""``SnellLinear`` saved, loaded, copied, moved to another dtype or device."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from layers import bits, draw, factors
from snell import SnellLinear


def test_state_dict_round_trip():
    layer, other = draw(), draw()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 14)
    assert other(x).equal(layer(x))
    assert set(layer.state_dict()) == {"weight", "bias", "snell_A", "snell_B", "snell_theta"}


def test_the_state_dict_of_a_merged_layer_holds_the_base_weight():
    layer = draw()
    plain = {name: t.clone() for name, t in layer.state_dict().items()}
    expected = layer(torch.ones(1, 14))
    layer.merge()
    merged = nn.Sequential(layer).state_dict()
    assert {name.removeprefix("0."): None for name in merged}.keys() == plain.keys()
    for name, tensor in plain.items():
        assert bits(merged["0." + name]).equal(bits(tensor))
    # Loading into a merged layer replaces what it was merged from.
    other = draw()
    other.merge()
    other.load_state_dict(plain)
    assert other(torch.ones(1, 14)).equal(expected)


def test_the_dict_of_a_plain_linear_loads():
    linear, layer = nn.Linear(14, 9), draw()
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert sorted(missing) == ["snell_A", "snell_B", "snell_theta"]
    assert not unexpected
    assert layer.weight.equal(linear.weight)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_whole_and_independent(how, merged):
    layer = draw(kernel="rbf")
    base, x = layer.weight.clone(), torch.randn(4, 14)
    if merged:
        layer.merge()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.merged == merged
    assert other(x).equal(layer(x))
    with torch.no_grad():
        layer.snell_A.zero_()
        layer.weight.zero_()
    other.unmerge()
    assert bits(other.weight).equal(bits(base))
    assert not other.weight.requires_grad


# --- dtype and device


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("convert", ["half", "bfloat16", "to"])
def test_a_half_precision_model_keeps_its_factors(convert, merged):
    layer = draw()
    layer(torch.randn(2, 14)).sum().backward()
    before = [t.clone() for t in factors(layer)]
    base = layer.weight.clone()
    if merged:
        layer.merge()
    dtype = torch.float16 if convert == "half" else torch.bfloat16
    model = nn.Sequential(layer)
    model.to(dtype) if convert == "to" else getattr(model, convert)()
    assert layer.weight.dtype == layer.bias.dtype == dtype
    for old, new in zip(before, factors(layer), strict=True):
        assert new.dtype == torch.float32
        assert new.equal(old)
    assert layer.snell_A.grad.dtype == torch.float32
    assert layer.merged == merged
    layer.unmerge()
    assert layer.weight.equal(base.to(dtype))
    y = layer(torch.randn(2, 14).to(dtype))
    assert y.dtype == dtype
    y.sum().backward()


def test_double_and_float_take_the_factors_along():
    layer = draw()
    expected = layer(torch.ones(1, 14))
    layer.double()
    assert {t.dtype for t in layer.parameters()} == {torch.float64}
    torch.testing.assert_close(layer(torch.ones(1, 14).double()), expected.double(), rtol=1e-4, atol=1e-4)
    layer.float()
    assert {t.dtype for t in layer.parameters()} == {torch.float32}
    assert layer(torch.ones(1, 14)).equal(expected)


def test_on_the_meta_device_only_shapes_are_made():
    options = {"rank": 6, "sparsity": 0.8, "scale": 0.3, "device": "meta"}
    layer = SnellLinear(14, 9, **options)
    x = torch.ones(3, 14, device="meta", requires_grad=True)
    y = layer(x)
    assert y.shape == (3, 9)
    y.sum().backward()
    assert layer.snell_A.grad.shape == (14, 6)
    source = draw()
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(3, 14)
    assert layer(x).equal(source(x))
    layer = SnellLinear(14, 9, **options)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer(x).equal(source(x))
