"""Adapters of convolutions: the kernel as a matrix, convolved with once."""

import copy

import pytest
import torch
from peft import get_peft_model
from test_layer import adapt
from torch import nn
from torch.nn import functional as F

from snell import reference
from snell.peft import SnellConfig


class Standardised(nn.Conv2d):
    """A convolution that changes its weight on the way."""

    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias, self.stride, self.padding)


#: A base and its input's shape.
KINDS = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "2d": (lambda: nn.Conv2d(4, 8, (3, 2), stride=2, dilation=(1, 2)), (2, 4, 7, 8)),
    "1x1": (lambda: nn.Conv2d(12, 8, 1, bias=False), (2, 12, 3, 3)),
    "3d": (lambda: nn.Conv3d(2, 8, 2), (2, 2, 4, 3, 3)),
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=4), (2, 8, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(8, 16, 3, groups=8), (2, 8, 5)),
    "circular": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "same": (lambda: nn.Conv2d(4, 8, 3, padding="same"), (2, 4, 5, 5)),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def drawn(kind, dtype=torch.float32, **settings):
    """An adapted layer whose update shows, an untouched copy of its base, and an input."""
    build, shape = KINDS[kind]
    base = build().to(dtype)
    return adapt(base, **{"sparsity": 0.6, **settings}), copy.deepcopy(base), torch.randn(shape, dtype=dtype)


@ALL
@pytest.mark.parametrize("kernel", ["piecewise_linear", "sigmoid"])
def test_outputs_and_gradients_are_those_of_the_reference(kind, kernel):
    layer, base, x = drawn(kind, torch.float64, kernel=kernel, train_theta=True)
    x.requires_grad_()
    y = layer(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()

    twin = x.detach().clone().requires_grad_()
    A, B, theta, spec = layer._parameters_of("default")
    A, B, theta = (t.detach().clone().requires_grad_() for t in (A, B, theta))
    settings = {"kernel": spec.kernel, "groups": spec.groups}
    tau = reference.select_threshold(A.detach(), B.detach(), theta.detach(), sparsity=spec.sparsity, **settings)
    delta = reference.merge(A, B, theta, tau, gate=spec.effective_gate, **settings)
    target = torch.func.functional_call(base, {"weight": base.weight.detach() + delta.view(base.weight.shape)}, twin)
    assert not torch.allclose(target, base(x))
    torch.testing.assert_close(y, target, rtol=1e-10, atol=1e-10)
    (target * weights).sum().backward()
    ours = [x.grad, *(getattr(layer, f"snell_{name}")["default"].weight.grad for name in ("A", "B", "theta"))]
    for one, other in zip(ours, (twin, A, B, theta), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-8, atol=1e-10)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_same_bits_and_unmerging_the_old_ones(kind, dtype):
    layer, base, x = drawn(kind, dtype)
    y, delta = layer(x), layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, (base.weight + delta).to(dtype))
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, base.weight)


@ALL
def test_a_fresh_identity_is_the_base_to_the_bit_and_trains(kind):
    layer, base, x = drawn(kind, init_weights="identity")
    assert torch.equal(layer(x), base.requires_grad_(False)(x))
    layer(x).square().sum().backward()
    assert layer.snell_A["default"].weight.grad.any()
    assert layer.snell_B["default"].weight.grad.any()


def test_a_kernel_in_another_memory_format_is_merged_in_place():
    layer, _, x = drawn("2d")
    layer = layer.to(memory_format=torch.channels_last)
    weight = layer.base_layer.weight
    before = weight.detach().clone()
    assert not weight.is_contiguous()
    y = layer(x)
    layer.merge()
    assert layer.base_layer.weight is weight
    assert weight.stride() == before.stride()
    torch.testing.assert_close(layer(x), y)
    assert not torch.equal(weight, before)
    layer.unmerge()
    assert torch.equal(weight, before)


def test_a_layer_that_changes_its_weight_is_called_as_it_is():
    base = Standardised(4, 8, 3)
    layer, x = adapt(base), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), base(x) + F.conv2d(x, layer.get_delta_weight("default")))


def test_dropout_drops_the_updates_input_alone():
    layer, base, x = drawn("2d", dropout=0.5)
    quiet = layer(x)
    layer.train()
    share = torch.stack([layer(x) for _ in range(400)]).mean(0) - base(x)
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(share, quiet - base(x), rtol=0, atol=0.3 * (quiet - base(x)).abs().max().item())


def test_autocast_and_half_precision():
    layer, _, x = drawn("2d")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        z = layer.base_layer(x)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_several_adapters_add_up_and_each_sample_may_have_its_own():
    build, shape = KINDS["groups"]
    settings = {"target_modules": ["0"], "init_weights": False}
    model = get_peft_model(nn.Sequential(build()), SnellConfig(r=4, **settings))
    model.add_adapter("other", SnellConfig(r=6, kernel="rbf", **settings))
    model.eval()
    layer, x = model.base_model.model[0], torch.randn(shape)
    alone = {"__base__": layer.base_layer(x)}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(x)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    torch.testing.assert_close(both, alone["default"] + alone["other"] - alone["__base__"])
    model.merge_adapter()
    assert torch.equal(model(x), both)
    model.unmerge_adapter()
    names = ["other", "default"]
    mixed = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(model(x, adapter_names=names), mixed)
    with model.disable_adapter():
        assert torch.equal(model(x), alone["__base__"])


def test_patterns_reach_convolutions():
    layer, *_ = drawn("2d", rank_pattern={"0": 6}, sparsity_pattern={"0": 0.75})
    assert layer.snell_A["default"].weight.shape == (4 * 3 * 2, 6)
    assert (layer.get_delta_weight("default") == 0).sum() == 0.75 * 8 * 24


def test_the_layer_compiles_whole():
    layer, _, x = drawn("2d")
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
