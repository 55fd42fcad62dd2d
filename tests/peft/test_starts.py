"""What is said of an adapter when it is attached: updates that cannot train, and updates larger than the weight."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import adapted, build
from torch import nn

from snell import SnellLinear
from snell.peft import AdaptedLinear, SnellConfig
from snell.spec import Spec


def said(work) -> list[str]:
    """The texts of the warnings of this package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "update" in str(w.message)]


class Two(nn.Module):
    def __init__(self, n: int = 8, m: int = 1) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(64, n), nn.Linear(n, m)


def test_a_layer_without_an_entry_left_to_train_is_named_once():
    model = Two()
    texts = said(lambda: get_peft_model(model, SnellConfig(target_modules=["wide", "head"], init_weights=False)))
    assert texts == [
        "head [out_features=1, in_features=8] has no entry to train: sparsity=0.9 sets all 8 entries of its update to "
        "0 for ever. A sparsity of at most 0.875 leaves one"
    ]
    layer = model.head
    layer(torch.randn(3, 8)).square().sum().backward()
    assert not layer.get_delta_weight("default").any()
    assert not layer.snell_A["default"].weight.grad.any()


@pytest.mark.parametrize(("n", "m", "sparsity"), [(8, 1, 0.9), (48, 64, 0.9999), (1, 1, 0.5), (7, 13, 0.995)])
def test_the_sparsity_that_is_named_leaves_one_entry_and_no_larger_one_does(n, m, sparsity):
    (text,) = said(lambda: SnellLinear(n, m, rank=2, sparsity=sparsity))
    named = float(text.split("at most ")[1].split(" ")[0])
    assert said(lambda: SnellLinear(n, m, rank=2, sparsity=named)) == []
    assert n * m - Spec(2, named).num_zeroed(n * m) == 1
    larger = min(named + 1e-9, sparsity)
    assert Spec(2, larger).num_zeroed(n * m) == n * m


def test_an_update_that_starts_larger_than_the_weight_is_named_with_its_size():
    model = Two(128, 96)
    with torch.no_grad():
        model.head.weight.mul_(0.01)
    (text,) = said(lambda: get_peft_model(model, SnellConfig(target_modules=["wide", "head"])))
    assert text.startswith("the update starts larger than the weight in 1 of 2 layer(s): in head its norm is about ")
    layer = model.head
    exact = layer.get_delta_weight("default").norm() / layer.base_layer.weight.norm()
    assert float(text.split("about ")[1].split(" ")[0]) == pytest.approx(exact.item(), rel=0.06)  # two digits


@pytest.mark.parametrize("kernel", ["piecewise_linear", "linear", "sigmoid", "rbf"])
@pytest.mark.parametrize("gate", ["soft", "magnitude", "hard"])
def test_the_size_of_a_large_layer_is_told_from_a_sample(kernel, gate):
    layer = SnellLinear(700, 900, rank=8, kernel=kernel, gate=gate)
    from snell.initial import relative_size

    told = relative_size(layer.snell_A, layer.snell_B, layer.snell_theta, layer.spec, layer.weight)
    assert told == pytest.approx((layer.delta_weight().norm() / layer.weight.norm()).item(), rel=0.25)


def test_a_usual_start_a_weight_of_zeros_and_a_loaded_adapter_say_nothing(tmp_path):
    assert said(lambda: SnellLinear.from_linear(nn.Linear(256, 256))) == []
    zeros = Two(128, 96)
    nn.init.zeros_(zeros.head.weight)
    assert said(lambda: get_peft_model(zeros, SnellConfig(target_modules=["head"]))) == []
    model = Two(128, 96)
    with torch.no_grad():
        model.head.weight.mul_(0.01)
    get_peft_model(model, SnellConfig(target_modules=["head"])).save_pretrained(tmp_path)
    base = Two(128, 96)
    nn.init.constant_(base.head.weight, 1e-6)
    assert said(lambda: PeftModel.from_pretrained(base, tmp_path)) == []


@pytest.mark.parametrize("kernel", ["piecewise_linear", "linear", "sigmoid", "rbf"])
@pytest.mark.parametrize("gate", ["soft", "magnitude", "hard"])
@pytest.mark.parametrize("scale", [None, 0.1, 3.0])
def test_a_start_for_tests_shows_and_is_small(kernel, gate, scale):
    model = nn.Sequential(nn.Linear(20, 10))
    config = SnellConfig(
        r=8, target_modules=["0"], init_weights=False, kernel=kernel, gate=gate, scale=scale, sparsity=0.5
    )
    layer = get_peft_model(model, config).base_model.model[0]
    assert isinstance(layer, AdaptedLinear)
    largest = layer.get_delta_weight("default").abs().max()
    assert 1e-4 < largest <= 0.5


def test_a_start_for_tests_on_the_meta_device_only_makes_shapes():
    with torch.device("meta"):
        model = build("llama")
    model = get_peft_model(model, SnellConfig(target_modules="all-linear", init_weights=False))
    assert all(p.is_meta for p in model.parameters())


def test_onnx_export_of_an_unmerged_adapter_says_to_merge_first(monkeypatch):
    model, _ = adapted("llama")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 24)
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    with pytest.raises(RuntimeError, match=r"no ONNX form: export what merge_and_unload\(\) returns"):
        layer(x)
    with model.disable_adapter():
        layer(x)
    model.merge_adapter()
    assert torch.equal(layer(x), layer.base_layer(x))
