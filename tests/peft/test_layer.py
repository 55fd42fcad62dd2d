"""One adapted layer: what it computes in each of its paths, against the float64 reference."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from interrupts import at_every_instruction
from snell import SnellLinear, reference
from snell.peft import AdaptedLinear, SnellConfig

N, M = 37, 29

EPS = torch.finfo(torch.float32).eps


class Opaque(nn.Module):
    """A base whose weight cannot be added to: 8-bit integers and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.qweight * self.scale).to(x.dtype), self.bias.to(x.dtype))


def adapt(base: nn.Module, **settings) -> AdaptedLinear:
    """The base inside a layer whose update shows."""
    model = get_peft_model(
        nn.Sequential(base), SnellConfig(**{"r": 8, "target_modules": ["0"], "init_weights": False, **settings})
    )
    return model.base_model.model[0].eval()


def conv1d() -> Conv1D:
    base = Conv1D(M, N)
    nn.init.normal_(base.bias)
    return base


def linear() -> nn.Linear:
    return nn.Linear(N, M)


def opaque() -> Opaque:
    return Opaque(linear())


def kernel_matrix(layer: AdaptedLinear, adapter: str = "default") -> torch.Tensor:
    """K in float64."""
    spec, update = layer.snell_spec[adapter], layer._update(adapter)
    A, B, theta = (t.detach().double() for t in update[:3])
    return reference.kernel_matrix(A, B, theta, kernel=spec.kernel, groups=spec.groups)


def delta(layer: AdaptedLinear, adapter: str = "default") -> torch.Tensor:
    """dW by the float64 reference."""
    spec, update = layer.snell_spec[adapter], layer._update(adapter)
    A, B, theta = (t.detach().double() for t in update[:3])
    settings = {"kernel": spec.kernel, "groups": spec.groups}
    tau = reference.select_threshold(A, B, theta, sparsity=spec.sparsity, **settings)
    return reference.merge(A, B, theta, tau, gate=spec.effective_gate, **settings)


def expected(layer: AdaptedLinear, x: torch.Tensor, *adapters: str) -> torch.Tensor:
    """base(x) + sum of x dW^T, in float64."""
    y = copy.deepcopy(layer.base_layer).double()(x.double())
    return y + sum(x.double() @ delta(layer, name).T for name in adapters)


def assert_close(
    y: torch.Tensor, target: torch.Tensor, x: torch.Tensor, layer: AdaptedLinear, eps: float = EPS
) -> None:
    """Within what rounding allows: |K| - tau keeps the error of |K|, so an entry of dW that of |K|^2."""
    entries = 1 + sum(kernel_matrix(layer, name).abs().max() ** 2 for name in layer.snell_A)
    # A few roundings an entry and one a product; r * |a| |b| bounds the statistic's own error by that of |K|.
    limit = 16 * eps * x.double().abs().sum(-1, keepdim=True) * entries
    worst = ((y.double() - target).abs() / limit).max() if y.numel() else torch.zeros(())
    assert worst <= 1, f"{worst:.2f} times what rounding allows"


BASES = pytest.mark.parametrize("base", [linear, conv1d, opaque], ids=lambda f: f.__name__)


@BASES
@pytest.mark.parametrize("kernel", ["piecewise_linear", "linear", "sigmoid", "rbf"])
def test_the_output_is_that_of_base_plus_update(base, kernel):
    layer = adapt(base(), kernel=kernel)
    x = torch.randn(2, 3, N)
    assert_close(layer(x), expected(layer, x, "default"), x, layer)


@BASES
def test_gradients_are_those_of_the_reference(base):
    layer = adapt(base(), train_theta=True)
    x, weight = torch.randn(5, N, requires_grad=True), torch.randn(5, M)
    (layer(x) * weight).sum().backward()

    spec, twin = layer.snell_spec["default"], x.detach().double().requires_grad_()
    factors = [factor["default"].weight for factor in (layer.snell_A, layer.snell_B, layer.snell_theta)]
    A, B, theta = (factor.detach().double().requires_grad_() for factor in factors)
    settings = {"sparsity": spec.sparsity, "kernel": spec.kernel, "groups": spec.groups, "gate": spec.gate}
    zeros = torch.zeros(M, N, dtype=torch.float64)
    share = reference.snell_linear(twin, zeros, None, A, B, theta, **settings)
    y = copy.deepcopy(layer.base_layer).double()(twin) + share
    (y * weight.double()).sum().backward()
    pairs = {
        "x": (x, twin),
        "A": (factors[0], A),
        "B": (factors[1], B),
        "theta": (factors[2], theta),
    }
    # The gate |K| - tau is small beside |K|, whose rounding it keeps.
    K = kernel_matrix(layer).abs()
    relative = 32 * EPS * K.max() / reference.gate_values(K, layer._update("default").tau, gate="soft").max()
    for name, (ours, theirs) in pairs.items():
        assert (ours.grad.double() - theirs.grad).abs().max() <= relative * theirs.grad.abs().max(), name
    assert all(p.grad is None for p in layer.base_layer.parameters())


def test_one_adapter_on_a_float_weight_is_the_fused_layer_bit_for_bit():
    base = linear()
    layer, twin = adapt(base), SnellLinear.from_linear(base, rank=8)
    with torch.no_grad():
        twin.snell_A.copy_(layer.snell_A["default"].weight)
        twin.snell_B.copy_(layer.snell_B["default"].weight)
    x = torch.randn(4, N)
    assert torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BASES
def test_half_precision_bases_keep_factors_in_float32(base, dtype):
    layer = adapt(base()).to(dtype)
    assert layer.snell_A["default"].weight.dtype == layer.snell_B["default"].weight.dtype == torch.float32
    x = torch.randn(6, N, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, expected(layer, x, "default"), x, layer, torch.finfo(dtype).eps)


@BASES
def test_autocast_gives_half_precision_outputs(base):
    layer = adapt(base())
    x = torch.randn(6, N)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected(layer, x, "default"), x, layer, torch.finfo(torch.bfloat16).eps)


@BASES
def test_several_active_adapters_add_up(base):
    layer = adapt(base())
    layer.update_layer("other", layer.snell_spec["default"], SnellConfig(r=8, init_weights=False))
    layer.set_adapter(["default", "other"])
    x = torch.randn(4, N)
    assert_close(layer(x), expected(layer, x, "default", "other"), x, layer)


@BASES
def test_samples_of_one_batch_choose_their_adapter(base):
    layer = adapt(base())
    layer.update_layer("other", layer.snell_spec["default"], SnellConfig(r=8, init_weights=False))
    x = torch.randn(4, 5, N)
    names = ["other", "__base__", "default", "other"]
    y = layer(x, adapter_names=names)
    assert torch.equal(y[1], layer.base_layer(x)[1])
    for i, name in enumerate(names):
        chosen = [] if name == "__base__" else [name]
        assert_close(y[i], expected(layer, x[i], *chosen), x[i], layer)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=names[:2])


@BASES
def test_dropout_falls_on_the_update_alone_and_in_training_alone(base):
    layer = adapt(base(), dropout=0.5)
    x = torch.randn(64, N)
    assert_close(layer(x), expected(layer, x, "default"), x, layer)
    layer.train()
    state = torch.get_rng_state()
    y = layer(x)
    torch.set_rng_state(state)
    dropped = nn.functional.dropout(x, 0.5)
    target = expected(layer, x) + dropped.double() @ delta(layer).T
    assert_close(y, target, dropped, layer)
    assert not torch.equal(layer(x), y)


@pytest.mark.parametrize("base", [linear, conv1d], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_keeps_the_output_and_unmerge_returns_the_weight_bit_for_bit(base, dtype):
    layer = adapt(base()).to(dtype)
    layer.update_layer("other", layer.snell_spec["default"], SnellConfig(r=8, init_weights=False))
    layer.set_adapter(["default", "other"])
    before, x = layer.base_layer.weight.detach().clone(), torch.randn(4, N, dtype=dtype)
    y = layer(x)
    layer.merge()
    assert layer.merged_adapters == ["default", "other"]
    assert_close(layer(x), y.double(), x, layer, torch.finfo(dtype).eps)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_an_interrupt_leaves_each_adapter_merged_or_not_and_says_which(monkeypatch):
    monkeypatch.setattr("snell.blocks.WORKSPACE_BYTES", 64 * 20 * 4)
    layer = adapt(nn.Linear(20, 100))  # two blocks of rows
    layer.update_layer("other", layer.snell_spec["default"], SnellConfig(r=8, init_weights=False))
    layer.set_adapter(["default", "other"])
    weight, states = layer.base_layer.weight, {}
    states[()] = weight.detach().clone()
    for name in ("default", "other"):
        layer.merge(adapter_names=[name])
        states[tuple(layer.merged_adapters)] = weight.detach().clone()
    assert len(states) == 3

    seen = set()
    for whole, work, again in (
        (("default", "other"), layer.unmerge, layer.merge),
        ((), layer.merge, layer.unmerge),
    ):
        assert tuple(layer.merged_adapters) == whole
        for instruction in at_every_instruction(work):
            left = tuple(layer.merged_adapters)
            seen.add(left)
            assert torch.equal(weight, states[left]), (work.__name__, instruction, left)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again()
            assert torch.equal(weight, states[whole]), (work.__name__, instruction, left)
    assert seen == set(states)


class Requantiser:
    """Stands for PEFT's backend of a quantisation: what merges into an :class:`Opaque` base."""

    supports_merge = True

    def get_base_weight(self, layer):
        return layer.qweight * layer.scale

    def set_base_weight(self, tuner_layer, weight):
        fresh = Opaque(nn.Linear(N, M, bias=False))
        fresh.weight = nn.Parameter(weight.clone(), requires_grad=False)
        fresh.scale = weight.abs().max() / 127
        fresh.qweight = (weight / fresh.scale).round().to(torch.int8)
        fresh.bias = tuner_layer.get_base_layer().bias
        tuner_layer.base_layer = fresh


def test_an_interrupt_leaves_a_quantised_base_merged_or_not_and_says_which(monkeypatch):
    monkeypatch.setattr("snell.peft.common.base.resolve_quantization_backend", lambda *_, **__: Requantiser())
    layer = adapt(opaque())
    layer.base_layer.weight = None  # PEFT asks every quantised layer for one
    states = {False: layer.base_layer.qweight.clone()}
    layer.merge()
    states[True] = layer.base_layer.qweight.clone()
    assert not torch.equal(states[True], states[False])
    for merged, work, again in ((True, layer.unmerge, layer.merge), (False, layer.merge, layer.unmerge)):
        assert layer.merged == merged
        for instruction in at_every_instruction(work):
            assert torch.equal(layer.base_layer.qweight, states[layer.merged]), (work.__name__, instruction)
            if layer.merged != merged:
                again()
            assert torch.equal(layer.base_layer.qweight, states[merged]), (work.__name__, instruction)


def test_an_adapter_is_merged_once():
    layer = adapt(linear())
    layer.merge()
    once = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.merge(adapter_names=["default"])
    assert layer.merged_adapters == ["default"]
    assert torch.equal(layer.base_layer.weight, once)


def test_training_on_after_a_merge_does_not_disturb_unmerging():
    layer = adapt(linear())
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    with torch.no_grad():
        layer.snell_A["default"].weight.normal_()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_moving_a_merged_layer_to_another_dtype_merges_anew():
    layer = adapt(linear())
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.bfloat16)
    assert layer.merged_adapters == ["default"]
    assert not torch.equal(layer.base_layer.weight, before.to(torch.bfloat16))
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before.to(torch.bfloat16))


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weight_alone():
    layer = adapt(linear())
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.snell_A["default"].weight[3, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_safe_merge_looks_at_the_sum_not_at_the_update():
    layer = adapt(linear()).half()
    update = layer.get_delta_weight("default").detach().half()
    row, column = divmod(int(update.argmax()), N)
    # Finite, as dW is; their sum is not in float16, whose largest number it is.
    with torch.no_grad():
        layer.base_layer.weight[row, column] = 65504
        for factor in (layer.snell_A, layer.snell_B):
            factor["default"].weight.mul_(30)
    assert update.max() > 0
    assert layer.get_delta_weight("default").half().isfinite().all()
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
    layer.merge()
    assert not layer.base_layer.weight.isfinite().all()


@pytest.mark.parametrize("base", [linear, conv1d], ids=lambda f: f.__name__)
def test_autocast_leaves_float64_alone_as_it_does_for_a_linear(base):
    layer = adapt(base().double())
    x = torch.randn(6, N, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("base", [linear, conv1d], ids=lambda f: f.__name__)
def test_the_gradient_of_a_bias_is_summed_in_the_biass_dtype(base):
    layer = adapt(base())
    bias = layer.base_layer.bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(257, N))
    y.sum().backward()
    # 257 is no bfloat16 number: the sum would be 256.
    assert torch.equal(bias.grad, torch.full((M,), 257.0))


def test_an_opaque_base_says_why_it_does_not_merge():
    layer = adapt(opaque())
    with pytest.raises(TypeError, match="Opaque"):
        layer.merge()
    assert not layer.merged


def test_hooks_on_the_base_layer_run():
    layer = adapt(linear())
    x, calls = torch.randn(3, N), []
    y = layer(x)
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    assert_close(layer(x), y.double(), x, layer)
    assert calls == [1]


@BASES
def test_no_tokens_give_no_outputs(base):
    assert adapt(base())(torch.empty(2, 0, N)).shape == (2, 0, M)


def test_delta_weight_is_laid_out_as_the_base_weight():
    for base in (linear(), conv1d()):
        layer = adapt(base)
        dense = layer.get_delta_weight("default")
        assert dense.shape == base.weight.shape
        target = delta(layer) if base.weight.shape == (M, N) else delta(layer).T
        limit = 16 * EPS * kernel_matrix(layer).abs().max() ** 2
        assert (dense - target).abs().max() <= limit


def test_the_published_start_is_small_and_the_identity_start_is_exactly_nothing():
    published = adapt(linear(), init_weights=True, scale=0.1)
    bound = 1 / (N * 8 / 2) ** 0.5
    assert 0.9 * bound < published.snell_A["default"].weight.abs().max() <= bound
    assert 0 < delta(published).abs().max() < 0.01

    for kernel in ("linear", "sigmoid"):
        layer = adapt(linear(), init_weights="identity", sparsity=0.0, kernel=kernel)
        assert torch.equal(layer.get_delta_weight("default"), torch.zeros(M, N))
        layer(torch.randn(4, N)).square().sum().backward()
        assert layer.snell_B["default"].weight.grad.abs().max() > 0


def test_an_update_of_exactly_nothing_has_no_gradient_where_entries_compete():
    # Why an identity start with sparsity subtracts one: K = 0 implies a gate of 0, whatever the gate.
    for gate in ("soft", "magnitude", "hard"):
        layer = adapt(linear(), kernel="linear", gate=gate)
        with torch.no_grad():
            layer.snell_B["default"].weight.zero_()
        layer(torch.randn(4, N)).square().sum().backward()
        assert not layer.snell_A["default"].weight.grad.any()
        assert not layer.snell_B["default"].weight.grad.any()


def test_scalars_train_when_asked_and_are_constants_otherwise():
    for kernel, train_theta, trained in (
        ("piecewise_linear", None, False),
        ("piecewise_linear", True, True),
        ("sigmoid", None, True),
        ("rbf", False, False),
        ("linear", True, False),
    ):
        layer = adapt(linear(), kernel=kernel, train_theta=train_theta)
        assert ("default" in layer.snell_theta) == trained
        assert all(p.requires_grad for name, p in layer.named_parameters() if "snell_" in name)


def test_copies_compute_the_same():
    layer = adapt(linear())
    x = torch.randn(3, N)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_constants_survive_a_trip_over_the_meta_device():
    layer = adapt(linear())
    state, x = copy.deepcopy(layer.state_dict()), torch.randn(3, N)
    y = layer(x)
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer(x), y)
