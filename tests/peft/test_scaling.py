"""Factors on dW: the survivors stay, every path takes the factor, and the gradient is the factor's."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale as pefts_context
from small_models import adapted, batch, config, logits
from test_layer import Opaque, adapt, assert_close, conv1d, delta, expected, kernel_matrix, linear
from torch import nn

from snell.peft import XpeftConfig, rescale_adapter_scale, use_profiles

BASES = {"linear": linear, "conv1d": conv1d, "opaque": lambda: Opaque(linear())}


def conv2d() -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, padding=1)


INPUTS = {
    "linear": lambda: torch.randn(5, 37),
    "conv1d": lambda: torch.randn(5, 37),
    "opaque": lambda: torch.randn(5, 37),
    "conv2d": lambda: torch.randn(2, 4, 5, 5),
    "embedding": lambda: torch.tensor([[3, 4, 3], [0, 22, 4]]),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("scale", [0.5, -2.0, 0.0])
def test_the_update_is_multiplied_and_so_is_what_merging_writes(kind, scale):
    made = {**BASES, "conv2d": conv2d, "embedding": lambda: nn.Embedding(23, 10, padding_idx=4)}[kind]()
    layer, x = adapt(made, r=4, sparsity=0.7), INPUTS[kind]()
    before = copy.deepcopy(made.state_dict())
    base, whole, dense = layer.base_layer(x), layer(x), layer.get_delta_weight("default")
    assert (whole - base).abs().max() > 1e-3
    layer.set_scale("default", scale)
    torch.testing.assert_close(layer(x) - base, scale * (whole - base), atol=2e-5, rtol=2e-4)
    assert torch.equal(layer.get_delta_weight("default"), scale * dense)
    if kind != "opaque":
        layer.merge(safe_merge=True)
        merged = made.weight.detach().clone()
        weight = before["weight"]
        where = dense != 0
        torch.testing.assert_close(merged[where], (weight + scale * dense)[where])
        assert torch.equal(merged[~where], weight[~where])
        assert torch.equal(merged.signbit()[~where], weight.signbit()[~where])
        layer.unmerge()
        assert all(torch.equal(made.state_dict()[key], value) for key, value in before.items())


def test_a_base_entry_of_minus_zero_keeps_its_sign():
    base = linear()
    base.weight.data.fill_(-0.0)
    layer = adapt(base)
    layer.set_scale("default", 0.5)
    untouched = layer.get_delta_weight("default") == 0
    layer.merge()
    assert base.weight[untouched].signbit().all()


def test_each_active_adapter_has_its_own_factor():
    layer, x = adapt(linear()), torch.randn(3, 37)
    other = copy.deepcopy(layer.snell_spec["default"])
    layer.update_layer("other", other, config(r=8))
    layer.set_adapter(["default", "other"])
    layer.set_scale("other", 0.25)
    target = expected(layer, x, "default") + 0.25 * x.double() @ delta(layer, "other").T
    assert_close(layer(x), target, x, layer)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = layer(x, adapter_names=names)
    target = torch.stack(
        [
            expected(layer, x[0]) + 0.25 * x[0].double() @ delta(layer, "other").T,
            expected(layer, x[1]),
            expected(layer, x[2], "default"),
        ]
    )
    assert_close(mixed, target, x, layer)


def test_an_adapter_merged_inside_the_context_keeps_its_factor():
    layer, x = adapt(linear()), torch.randn(3, 37)
    with rescale_adapter_scale(layer, 0.5):
        layer.merge()
    y = layer(x)
    layer.to("cpu")  # takes it out, and merges it again
    assert torch.equal(layer(x), y)
    assert layer.scaling == {"default": 0.5}


@pytest.mark.parametrize("update", ["lora", "snell"])
@pytest.mark.parametrize("profiles", [None, [1, 0]])
def test_profiles_are_scaled_too(update, profiles):
    settings = {"num_adapters": 5, "k": 2, "r": 4, "num_profiles": 1 if profiles is None else 2, "update": update}
    model = nn.Sequential(nn.Linear(24, 20))
    model = get_peft_model(model, XpeftConfig(target_modules=["0"], init_weights=False, scale=1.0, **settings))
    layer, x = model.base_model.model[0], torch.randn(2, 24)
    with nullcontext() if profiles is None else use_profiles(model, profiles):
        share = model(x) - layer.base_layer(x)
        layer.set_scale("default", 3.0)
        torch.testing.assert_close(model(x) - layer.base_layer(x), 3 * share, atol=1e-5, rtol=1e-4)
    assert share.abs().max() > 1e-4


def test_scaling_calls_follow_loras_layers():
    model, _ = adapted("llama")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.scale_layer(3)
    layer.scale_layer(0.5)
    assert layer.scaling == {"default": 1.5}
    layer.unscale_layer(3)
    assert layer.scaling == {"default": 0.5}
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.0}
    layer.set_scale("absent", 4)
    assert layer.scaling == {"default": 1.0}
    layer.set_scale("default", 2)
    model.delete_adapter("default")
    assert layer.scaling == {}


@pytest.mark.parametrize(("scale", "error"), [(float("nan"), ValueError), ("2", TypeError), (True, TypeError)])
def test_a_factor_that_is_no_finite_number_is_refused(scale, error):
    layer = adapt(linear())
    with pytest.raises(error, match="scale must be"):
        layer.set_scale("default", scale)
    with pytest.raises(error, match="multiplier must be"), rescale_adapter_scale(layer, scale):
        pass


def test_a_merged_adapters_factor_does_not_change():
    layer = adapt(linear())
    layer.merge()
    for call in (lambda: layer.set_scale("default", 2), lambda: layer.scale_layer(2), layer.unscale_layer):
        with pytest.raises(ValueError, match="unmerge_adapter"):
            call()
    with pytest.raises(ValueError, match="unmerge_adapter"), rescale_adapter_scale(layer, 2.0):
        pass
    assert layer.scaling == {"default": 1.0}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_context_scales_a_whole_model_and_puts_the_factors_back(name):
    model, base = adapted(name)
    inputs = batch(name)
    plain, whole = logits(base, inputs), logits(model, inputs)
    first = next(layer for layer in model.modules() if hasattr(layer, "snell_A"))
    first.set_scale("default", 2.0)
    scaled = logits(model, inputs)
    with rescale_adapter_scale(model, 0):
        torch.testing.assert_close(logits(model, inputs), plain)
    assert torch.equal(logits(model, inputs), scaled)
    with pytest.raises(ValueError, match="input_ids"), rescale_adapter_scale(model, 0.5):
        model()
    assert first.scaling["default"] == 2.0
    first.unscale_layer()
    assert torch.equal(logits(model, inputs), whole)
    with pytest.raises(ValueError, match="LoraLayer"), pefts_context(model, 0.5):
        pass
    with pytest.raises(ValueError, match="SNELL layers"), rescale_adapter_scale(base, 0.5):
        pass


@pytest.mark.parametrize("gate", ["hard", "none"])
def test_the_gradient_at_a_factor_is_exact(gate):
    """With these gates dW = K where an entry survives, and who survives is constant near the factors."""
    base = nn.Linear(6, 5).double()
    layer = adapt(base, r=4, sparsity=0.5 if gate == "hard" else 0.0, gate=gate, scale=1.0).train()
    layer.set_scale("default", 0.7)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    factors = [layer.snell_A["default"].weight, layer.snell_B["default"].weight]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), [x, *factors])
    assert kernel_matrix(layer).abs().max() > 0
    layer.set_scale("default", 1.0)
    (whole,) = torch.autograd.grad(layer(x).sum(), factors[:1])
    layer.set_scale("default", 0.7)
    (part,) = torch.autograd.grad(layer(x).sum(), factors[:1])
    torch.testing.assert_close(part, 0.7 * whole)


def test_with_the_soft_gate_the_gradient_is_the_factor_times_that_without():
    layer = adapt(nn.Linear(9, 7).double(), r=4, sparsity=0.6, scale=1.0)
    x, target = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    factors = [layer.snell_A["default"].weight, layer.snell_B["default"].weight]
    whole = torch.autograd.grad((layer(x) * target).sum(), factors)
    layer.set_scale("default", -1.5)
    part = torch.autograd.grad((layer(x) * target).sum(), factors)
    for ours, theirs in zip(part, whole, strict=True):
        torch.testing.assert_close(ours, -1.5 * theirs)
        assert theirs.any()


def test_an_identity_start_is_scaled_as_a_whole():
    base = linear()
    untouched = copy.deepcopy(base)
    model = get_peft_model(nn.Sequential(base), config(target_modules=["0"], init_weights="identity", r=8))
    layer, x = model.base_model.model[0], torch.randn(3, 37)
    layer.set_scale("default", 3.0)
    assert torch.equal(layer(x), untouched(x))
    layer.merge()
    assert torch.equal(base.weight, untouched.weight)
