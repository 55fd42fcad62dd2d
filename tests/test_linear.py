"""``SnellLinear`` as a module: what it holds, merges, saves, copies and compiles to."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from cases import KERNELS
from snell import SnellLinear, functional, reference

GATES = ("soft", "magnitude", "hard")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(n=14, m=9, dtype=torch.float32, **options):
    """A layer whose update is large enough to be seen in any dtype."""
    layer = SnellLinear(n, m, dtype=dtype, **{"rank": 6, "sparsity": 0.8, "scale": 0.3, **options})
    with torch.no_grad():
        for factor in (layer.snell_A, layer.snell_B):
            factor.normal_()
    return layer


def settings(layer):
    spec = layer.spec
    return {"sparsity": spec.sparsity, "kernel": spec.kernel, "groups": spec.groups, "gate": spec.gate}


def factors(layer):
    return layer.snell_A, layer.snell_B, layer.snell_theta


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


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
    monkeypatch.setattr("snell.schedule.WORKSPACE_BYTES", 64 * 20 * 4)
    layer = draw(20, 200)
    base = layer.weight.clone()
    linear = layer.to_linear()
    assert layer.num_survivors() == layer.delta_weight().count_nonzero()
    layer.merge()
    assert layer.weight.equal(linear.weight)
    layer.unmerge()
    assert bits(layer.weight).equal(bits(base))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_to_linear_is_an_ordinary_linear(backend, bias, merged):
    layer = draw(bias=bias).eval()
    x = torch.randn(4, 14)
    expected = layer(x)
    if merged:
        layer.merge()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert not linear.training
    assert (linear.bias is not None) == bias
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    assert linear.weight.data_ptr() != layer.weight.data_ptr()
    with torch.no_grad():
        linear.weight.zero_()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


# --- state dict, copies


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


# --- modes


def test_eval_train_no_grad_and_inference_mode_give_the_same_bits(backend):
    layer = draw()
    x = torch.randn(4, 14)
    expected = layer.train()(x)
    with torch.inference_mode():
        assert layer(x).equal(expected)
        assert not layer(x).requires_grad
        layer.snell_A.mul_(1.0)
    assert layer.eval()(x).equal(expected)
    with torch.no_grad():
        assert not layer(x).requires_grad
    # A threshold first selected under inference mode must serve training afterwards.
    with torch.no_grad():
        layer.snell_A.mul_(1.5)
    with torch.inference_mode():
        expected = layer(x)
    y = layer.train()(x)
    assert y.equal(expected)
    y.sum().backward()
    assert layer.snell_A.grad.isfinite().all()


def test_autocast_gives_bfloat16_out_and_float32_gradients(backend):
    layer = draw()
    x = torch.randn(4, 14, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.snell_A.grad.dtype == torch.float32
    grad = layer.snell_A.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert (grad - layer.snell_A.grad).norm() < 0.03 * layer.snell_A.grad.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(backend, use_reentrant, autocast):
    layers = nn.Sequential(draw(14, 9), nn.GELU(), draw(9, 14))
    x = torch.randn(4, 14, requires_grad=True)
    results = []
    for recompute in (False, True):
        layers.zero_grad()
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = checkpoint(layers, x, use_reentrant=use_reentrant) if recompute else layers(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layers.parameters() if p.requires_grad)])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def saved_bytes(layer, x):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    base = {t.untyped_storage().data_ptr() for t in layer.parameters()}
    return sum(t.nbytes for pointer, t in kept.items() if pointer not in base)


def test_a_layer_saves_x_and_tau_and_frozen_not_even_x(backend):
    layer = draw(40, 50)
    x = torch.randn(64, 40, requires_grad=True)
    tau = layer.threshold().nbytes
    assert saved_bytes(layer, x) == x.nbytes + tau
    layer.snell_A.requires_grad_(False)
    layer.snell_B.requires_grad_(False)
    assert saved_bytes(layer, x) == tau
    assert saved_bytes(layer, x.detach()) == 0


def test_factors_stored_by_columns_get_the_same_gradients():
    layer, x = draw(), torch.randn(5, 14)
    other = copy.deepcopy(layer)
    other.snell_A.data, other.snell_B.data = (t.data.t().contiguous().t() for t in (other.snell_A, other.snell_B))
    for each in (layer, other):
        each(x).square().sum().backward()
        each.delta_weight().square().sum().backward()
    for name in ("snell_A", "snell_B"):
        torch.testing.assert_close(getattr(other, name).grad, getattr(layer, name).grad)


def test_accumulated_gradients_are_the_sum(backend):
    layer = draw(dtype=torch.float64)
    x = torch.randn(8, 14, dtype=torch.float64)
    layer(x).square().sum().backward()
    whole = layer.snell_B.grad.clone()
    layer.zero_grad()
    for part in x.split(3):
        layer(part).square().sum().backward()
    torch.testing.assert_close(layer.snell_B.grad, whole, rtol=1e-12, atol=1e-12)


# --- the compiler


@pytest.mark.parametrize("kernel", ["piecewise_linear", "rbf"])
def test_compiles_whole_with_a_dynamic_batch(backend, kernel):
    layer = draw(kernel=kernel, train_theta=True)
    model = nn.Sequential(layer, nn.GELU())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 7, 12):
        x = torch.randn(tokens, 14, requires_grad=True)
        results = []
        for run in (model, compiled):
            layer.zero_grad()
            x.grad = None
            y = run(x)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(t.grad.clone() for t in factors(layer))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # The graph selects again: a threshold may not be baked in.
    with torch.no_grad():
        layer.snell_A.mul_(3)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_inductor_compiles_forward_and_backward_under_autocast():
    layer = draw()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(torch.ones(4, 14))
        y.float().square().sum().backward()
        results.append([y.detach(), layer.snell_A.grad.clone(), layer.snell_B.grad.clone()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_compile_saves_no_more_for_backward_than_eager_does(backend):
    """The partitioner is shown the same minimal set: x, factors, tau and the weight."""
    layer = draw(40, 50)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(64, 40, requires_grad=True)
    compiled(x).sum().backward()
    assert saved_bytes(compiled, x) <= x.nbytes + layer.threshold().nbytes
