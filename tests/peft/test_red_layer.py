"""One layer whose outputs are edited: what it computes in each of its paths, against the float64 formula."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_layer import M, N, Requantiser, conv1d, linear, opaque
from torch import nn

from interrupts import at_every_instruction
from snell.peft import EditedLinear, RedConfig, SnellConfig
from snell.testing.bounds import growth


def no_bias() -> nn.Linear:
    return nn.Linear(N, M, bias=False)


def edit(base: nn.Module, *names: str, **settings) -> EditedLinear:
    """The base inside a layer whose edits show; further adapters are added, and all are active."""
    model = get_peft_model(
        nn.Sequential(base), RedConfig(**{"target_modules": ["0"], "init_weights": False, **settings})
    )
    layer = model.base_model.model[0].eval()
    for name in names:
        layer.update_layer(name, RedConfig(**{"init_weights": False, **settings}))
    layer.set_adapter(["default", *names])
    return layer


def vectors(layer: EditedLinear, name: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    return layer.repr_scaling[name].weight, layer.repr_bias[name].weight


def expected(layer: EditedLinear, x: torch.Tensor, *names: str) -> torch.Tensor:
    """s * base(x) + c of each adapter in turn, in float64."""
    z = copy.deepcopy(layer.base_layer).double()(x.double())
    for name in names:
        s, c = vectors(layer, name)
        z = s.double() * z + c.double()
    return z


def assert_close(z: torch.Tensor, layer: EditedLinear, x: torch.Tensor, *names: str, eps=None) -> None:
    """Within what rounding x, W and z to their dtype allows."""
    eps = torch.finfo(z.dtype).eps if eps is None else eps
    magnitude = copy.deepcopy(layer.base_layer).double()
    for parameter in magnitude.parameters():
        parameter.data.abs_()
    for buffer in magnitude.buffers():
        buffer.data.abs_()
    bound = magnitude(x.double().abs())
    for name in names:
        s, c = vectors(layer, name)
        bound = s.double().abs() * bound + c.double().abs()
    wrong = ((z.double() - expected(layer, x, *names)).abs() / (growth(N) * eps * bound)).max()
    assert wrong <= 1, f"{wrong:.2f} times what rounding allows"


BASES = pytest.mark.parametrize("base", [linear, conv1d, opaque, no_bias], ids=lambda f: f.__name__)
FLOAT = pytest.mark.parametrize("base", [linear, conv1d, no_bias], ids=lambda f: f.__name__)


@BASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_the_bases_scaled_and_shifted(base, dtype):
    layer = edit(base()).to(dtype)
    assert all(vector.dtype == torch.float32 for vector in vectors(layer))
    x = torch.randn(2, 3, N, dtype=dtype)
    assert layer(x).dtype == dtype
    assert_close(layer(x), layer, x, "default")


@BASES
def test_a_fresh_edit_keeps_every_bit(base):
    layer = edit(base(), init_weights=True)
    x = torch.randn(5, N)
    z = layer(x)
    assert torch.equal(z.view(torch.int32), layer.base_layer(x).view(torch.int32))
    layer.base_layer.register_forward_hook(lambda module, args, y: torch.full_like(y, -0.0))
    assert layer(x).signbit().all()


@BASES
def test_gradients_are_those_of_the_formula(base):
    layer = edit(base())
    x, weight = torch.randn(5, N, requires_grad=True), torch.randn(5, M)
    (layer(x) * weight).sum().backward()
    twin = x.detach().double().requires_grad_()
    s, c = (vector.detach().double().requires_grad_() for vector in vectors(layer))
    z = s * copy.deepcopy(layer.base_layer).double()(twin) + c
    (z * weight.double()).sum().backward()
    for ours, theirs in zip((x, *vectors(layer)), (twin, s, c), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in layer.base_layer.parameters())


@FLOAT
def test_backward_keeps_outputs_and_never_inputs(base):
    layer, x = edit(base()), torch.randn(50, N, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    shapes = [t.numel() for t in kept if t.untyped_storage().data_ptr() not in held]
    assert shapes == [50 * M]


def test_without_one_of_the_vectors_it_is_ia3_or_a_trained_bias():
    base, x = linear(), torch.randn(4, N)
    layer = edit(base, init_weights=True)
    s, c = vectors(layer)
    with torch.no_grad():
        s.normal_()
    # (IA)^3 on a layer's outputs: a scaling alone.
    assert torch.equal(layer(x), base(x) * s)
    with torch.no_grad():
        s.fill_(1)
        c.normal_()
    # BitFit and BEFT on this layer: a bias alone.
    assert torch.equal(layer(x), base(x) + c)


@BASES
def test_several_active_adapters_edit_one_after_another(base):
    layer, x = edit(base(), "other"), torch.randn(4, N)
    assert_close(layer(x), layer, x, "default", "other")
    forward = layer(x)
    layer.set_adapter(["other", "default"])
    assert_close(layer(x), layer, x, "other", "default")
    assert not torch.allclose(layer(x), forward)


@BASES
def test_samples_of_one_batch_choose_their_adapter(base):
    layer, x = edit(base(), "other"), torch.randn(4, 5, N)
    names = ["other", "__base__", "default", "other"]
    z = layer(x, adapter_names=names)
    assert torch.equal(z[1], layer.base_layer(x)[1])
    for i, name in enumerate(names):
        assert_close(z[i], layer, x[i], *([] if name == "__base__" else [name]))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=names[:2])


@FLOAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_rounds_once_and_unmerging_returns_the_bits(base, dtype):
    layer = edit(base().to(dtype))
    with torch.no_grad():
        vectors(layer)[0][:3] = 0
    inner, x = layer.base_layer, torch.randn(4, N, dtype=dtype)
    weight, bias, s, c = inner.weight.detach().clone(), inner.bias, *(v.detach().double() for v in vectors(layer))
    kept = None if bias is None else bias.detach().clone()
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["default"]
    rows = s if base is conv1d else s[:, None]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(inner.weight.double(), rows * weight.double(), rtol=eps, atol=0)
    old = torch.zeros(M, dtype=torch.float64) if kept is None else kept.double()
    assert inner.bias.dtype == dtype
    torch.testing.assert_close(inner.bias.double(), s * old + c, rtol=eps, atol=2 * eps * (s * old).abs().max().item())
    assert torch.equal(layer(x), inner(x))
    layer.unmerge()
    assert torch.equal(inner.weight, weight)
    assert inner.bias is bias
    assert kept is None or torch.equal(inner.bias, kept)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@FLOAT
def test_adapters_merge_in_the_order_they_are_active(base):
    layer, x = edit(base(), "other"), torch.randn(4, N)
    z, untouched = layer(x), copy.deepcopy(layer.base_layer)
    layer.merge()
    assert layer.merged_adapters == ["default", "other"]
    torch.testing.assert_close(layer(x), z, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    for key, value in untouched.state_dict().items():
        assert torch.equal(layer.base_layer.state_dict()[key], value)
    assert (layer.base_layer.bias is None) == (untouched.bias is None)


def test_more_rows_than_merge_at_a_time(monkeypatch):
    monkeypatch.setattr("snell.peft.red.layer._ROWS", 8)
    layer = edit(linear())
    before, s = layer.base_layer.weight.detach().clone(), vectors(layer)[0].detach()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, before * s[:, None])
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("where", [0, 1])
def test_safe_merge_refuses_a_broken_edit_and_leaves_the_layer_alone(where):
    layer = edit(linear())
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias
    with torch.no_grad():
        vectors(layer)[where][3] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert layer.base_layer.bias is bias
    assert not layer.merged


def test_safe_merge_looks_at_what_is_written():
    layer = edit(linear().half())
    with torch.no_grad():
        # Finite in float32, and not in float16, whose largest number is 65504.
        layer.base_layer.weight[3, 1], vectors(layer)[0][3] = 60000, 2
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_an_interrupt_leaves_each_edit_merged_or_not_and_says_which(monkeypatch):
    monkeypatch.setattr("snell.peft.red.layer._ROWS", 16)
    layer = edit(no_bias(), "other")

    def state() -> list[torch.Tensor]:
        found = layer.base_layer
        return [found.weight.detach().clone(), *([] if found.bias is None else [found.bias.detach().clone()])]

    states = {(): state()}
    for name in ("default", "other"):
        layer.merge(adapter_names=[name])
        states[tuple(layer.merged_adapters)] = state()
    assert len(states) == 3

    def is_in(names: tuple[str, ...]) -> bool:
        now = state()
        return len(now) == len(states[names]) and all(map(torch.equal, now, states[names]))

    seen = set()
    for whole, work, again in (
        (("default", "other"), layer.unmerge, layer.merge),
        ((), layer.merge, layer.unmerge),
    ):
        assert tuple(layer.merged_adapters) == whole
        for instruction in at_every_instruction(work):
            left = tuple(layer.merged_adapters)
            seen.add(left)
            assert is_in(left), (work.__name__, instruction, left)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again()
            assert is_in(whole), (work.__name__, instruction, left)
    assert seen == set(states)


def test_a_quantised_base_is_quantised_anew_and_put_back(monkeypatch):
    monkeypatch.setattr("snell.peft.common.base.resolve_quantization_backend", lambda *_, **__: Requantiser())
    layer = edit(opaque())
    layer.base_layer.weight = None  # PEFT asks every quantised layer for one
    layer.base_layer.bias.data = layer.base_layer.bias.data.bfloat16()
    untouched, x = layer.base_layer, torch.randn(4, N)
    before = [untouched.qweight.clone(), untouched.bias.detach().clone()]
    z, s = layer(x), vectors(layer)[0].detach()
    layer.merge()
    fresh = layer.base_layer
    assert fresh.bias.dtype == torch.bfloat16
    target = (before[0] * untouched.scale) * s[:, None]
    assert ((fresh.qweight * fresh.scale) - target).abs().max() <= 0.51 * fresh.scale
    torch.testing.assert_close(layer(x), z, rtol=0.1, atol=0.2)
    layer.unmerge()
    assert layer.base_layer is untouched
    assert torch.equal(untouched.qweight, before[0])
    assert torch.equal(untouched.bias, before[1])


def test_an_opaque_base_says_why_it_does_not_merge():
    layer = edit(opaque())
    with pytest.raises(TypeError, match="Opaque"):
        layer.merge()
    assert not layer.merged


def test_moving_a_merged_layer_to_another_dtype_merges_anew():
    layer = edit(linear())
    before = copy.deepcopy(layer.base_layer).bfloat16()
    layer.merge()
    layer.to(torch.bfloat16)
    assert layer.merged_adapters == ["default"]
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before.weight)
    assert torch.equal(layer.base_layer.bias, before.bias)


@BASES
def test_autocast_gives_half_precision_outputs(base):
    layer, x = edit(base()), torch.randn(6, N)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    assert z.dtype == torch.bfloat16
    assert_close(z, layer, x, "default")


@pytest.mark.parametrize("kind", ["lora", "snell"])
@FLOAT
def test_it_edits_what_another_tuners_layer_on_the_same_base_answers(base, kind):
    untouched, settings = base(), {"r": 4, "target_modules": ["0"]}
    config = SnellConfig(**settings, init_weights=False) if kind == "snell" else LoraConfig(**settings)
    below = get_peft_model(nn.Sequential(copy.deepcopy(untouched)), config).eval()
    if kind == "lora":
        nn.init.normal_(below.base_model.model[0].lora_B["default"].weight)
    model = get_peft_model(
        below.get_base_model(), RedConfig(target_modules=["0"], init_weights=False), adapter_name="edit"
    ).eval()
    layer = model.base_model.model[0]
    inner, x = layer.base_layer, torch.randn(5, N)
    assert isinstance(layer, EditedLinear)
    s, c = vectors(layer, "edit")
    torch.testing.assert_close(layer(x), s * inner(x) + c)
    assert not torch.allclose(inner(x), untouched(x))

    # Both train: the update's gradient has the factor s.
    layer(x).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(p.grad.any() for p in trained)

    z = layer(x)
    layer.merge(adapter_names=["edit"])
    assert inner.merged
    torch.testing.assert_close(layer(x), z, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert not inner.merged
    # LoRA takes its update out by subtraction; SNELL's and RED's records give the bits back.
    exact = {} if kind == "lora" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(layer.get_base_layer().weight, untouched.weight, **exact)
    assert (layer.get_base_layer().bias is None) == (untouched.bias is None)
    merged = model.merge_and_unload()[0]
    assert type(merged) is type(untouched)
    torch.testing.assert_close(merged(x), z, rtol=1e-4, atol=1e-4)


def test_hooks_on_the_base_layer_run_and_a_wrong_answer_is_refused():
    layer, x = edit(linear()), torch.randn(3, N)
    layer.base_layer.register_forward_hook(lambda module, args, y: y[:2])
    with pytest.raises(ValueError, match=r"the base layer answers \(2, 29\) to \(3, 37\)"):
        layer(x)


def test_a_compiled_layer_gives_the_same_without_a_break():
    layer, x = edit(linear(), "other"), torch.randn(5, N, requires_grad=True)
    layer.set_adapter(["default", "other"])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = (x, *vectors(layer), *vectors(layer, "other"))
    results = [(z, *torch.autograd.grad(z.square().sum(), leaves)) for z in (layer(x), compiled(x))]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_compute_the_same():
    layer, x = edit(linear()), torch.randn(3, N)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_values_that_are_not_finite_do_not_load():
    layer = edit(linear())
    state = copy.deepcopy(layer.state_dict())
    state["repr_bias.default.weight"][2] = float("inf")
    with pytest.raises(RuntimeError, match=r"repr_bias\.default\.weight holds NaN or infinite values"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("inference", [False, True])
def test_an_edit_added_to_a_layer_trains_unless_it_is_for_inference(inference):
    layer = edit(no_bias())
    layer.update_layer("second", RedConfig(init_weights=False, inference_mode=inference))
    layer.set_adapter(["default"])
    layer.update_layer("default", RedConfig(init_weights=False, inference_mode=inference))
    assert [vector.requires_grad for vector in vectors(layer)] == [not inference] * 2
    assert [vector.requires_grad for vector in vectors(layer, "second")] == [False] * 2
