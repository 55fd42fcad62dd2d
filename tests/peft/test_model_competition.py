"""``competition="model"``: one threshold for all layers of an adapter, in all that PEFT does with adapters."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from small_models import batch, build, logits, train

from snell import functional
from snell.cli import main
from snell.cli.adapter import read
from snell.initial import size_at_start
from snell.peft import AdaptedLinear, SnellConfig
from snell.spec import Spec
from snell.training import BudgetSchedule, SparsityBudget
from snell.update import Update


def config(**settings):
    return SnellConfig(**{"r": 4, "sparsity": 0.8, "competition": "model", "target_modules": "all-linear", **settings})


def layers(model):
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def kept(model, name="default"):
    return [int((layer.get_delta_weight(name) != 0).sum()) for layer in layers(model)]


def kept_by_sorting(model, name="default", sparsity=0.8):
    """What each layer keeps, from all layers' \\|K\\| sorted. Of entries that tie with the last one, none is kept."""
    sizes = []
    for layer in layers(model):
        A, B, theta, spec = layer._parameters_of(name)
        whole = Spec(spec.rank, 0.0, spec.kernel, spec.groups).applied
        K = functional.dense(Update(A, B, theta, torch.zeros(()), whole))
        sizes.append(K.detach().double().abs().flatten() / size_at_start(*K.shape, spec, sparsity))
    every = torch.cat(sizes)
    threshold = every.kthvalue(math.ceil(sparsity * every.numel())).values
    return [int((size > threshold).sum()) for size in sizes]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return get_peft_model(build("bert"), config(init_weights=False)).eval()


@pytest.mark.parametrize("kernel", ["piecewise_linear", "linear", "sigmoid", "rbf"])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_layers_keep_the_total_together(arch, kernel):
    model = get_peft_model(build(arch), config(kernel=kernel, gate="hard", init_weights=False))
    model(**batch(arch, 2))
    assert kept(model) == kept_by_sorting(model)
    assert len(set(kept(model))) > 1


@pytest.mark.parametrize("kernel", ["piecewise_linear", "linear", "sigmoid", "rbf"])
def test_a_fresh_adapter_has_about_the_same_sparsity_everywhere(kernel):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.Linear(2048, 512), torch.nn.Linear(512, 512))
    model = get_peft_model(base, config(kernel=kernel, r=32, gate="hard", target_modules=["0", "1", "2"]))
    model(torch.randn(2, 512))
    sizes = [layer.in_features * layer.out_features for layer in layers(model)]
    shares = [count / size for count, size in zip(kept(model), sizes, strict=True)]
    assert all(0.17 < share < 0.23 for share in shares), shares


def test_training_moves_entries_between_layers_and_keeps_the_total():
    torch.manual_seed(0)
    model = get_peft_model(build("bert"), config(gate="hard"))
    model(**batch("bert", 2))
    before = kept(model)
    train(model, batch("bert", 4), steps=3)
    model(**batch("bert", 2))
    assert kept(model) != before
    assert kept(model) == kept_by_sorting(model)


def test_a_layer_is_asked_by_itself_after_its_factors_changed(model):
    first, *_ = layers(model)
    first.snell_A["default"].weight.data *= 1.0  # through .data: seen in the next forward
    with torch.no_grad():
        first.snell_A["default"].weight.mul_(0.0)
        first.snell_B["default"].weight.mul_(0.0)
    assert kept(model)[0] == 0
    assert kept(model) == kept_by_sorting(model)


def test_an_edit_through_data_is_seen_in_the_next_forward(model):
    inputs = batch("bert", 2)
    before = logits(model, inputs)
    for layer in layers(model)[:1]:
        layer.snell_A["default"].weight.data *= 3
    changed = copy.deepcopy(model)
    assert not torch.equal(logits(model, inputs), before)
    assert torch.equal(logits(changed, inputs), logits(model, inputs))


def test_saved_and_loaded_it_gives_the_same_bits(model, tmp_path):
    inputs = batch("bert", 2)
    base = copy.deepcopy(model).unload()
    train(model, batch("bert", 4), steps=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert loaded.peft_config["default"].competition == "model"
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_merging_gives_the_outputs_and_unmerging_the_weights(model):
    inputs = batch("bert", 2)
    weights = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    expected = logits(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    assert torch.equal(logits(model, inputs), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), expected)


def test_a_second_adapter_competes_by_itself(model):
    inputs = batch("bert", 2)
    expected = logits(model, inputs)
    model.add_adapter("second", config(sparsity=0.5, gate="hard", init_weights=False))
    model.add_adapter("third", replace(config(), competition="layer"))
    model.set_adapter("second")
    logits(model, inputs)
    assert kept(model, "second") == kept_by_sorting(model, "second", 0.5)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), expected)
    assert not any("second" in layer.snell_competition for layer in layers(model))


def test_a_copy_competes_among_its_own_layers(model):
    inputs = batch("bert", 2)
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(twin):
            layer.snell_A["default"].weight.mul_(2)
    assert not torch.equal(logits(twin, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_an_identity_start_is_the_base_model_to_the_bit(arch):
    base = build(arch).eval()
    inputs = batch(arch, 2)
    expected = logits(base, inputs)
    model = get_peft_model(base, config(init_weights="identity"))
    assert torch.equal(logits(model, inputs), expected)
    train(model, batch(arch, 4), steps=2)
    assert not torch.equal(logits(model, inputs), expected)


def test_checkpointing_recomputes_with_the_same_thresholds():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), config(init_weights=False)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(**batch("llama", 2)).loss.backward()
        grads.append([layer.snell_A["default"].weight.grad for layer in layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiled_it_gives_the_same_outputs(model):
    inputs = batch("bert", 2)
    expected = logits(model, inputs)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), expected)
    with torch.no_grad():
        for layer in layers(model):
            layer.snell_A["default"].weight.mul_(1.5)
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
    assert not torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("start", [False, "identity"])
def test_inspect_counts_what_the_model_keeps(start, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(build("bert"), config(init_weights=start, gate="hard"))
    train(model, batch("bert", 4), steps=2)
    model.save_pretrained(tmp_path)
    found = {name: update.tau for name, update in read(tmp_path).updates()}
    logits(model, batch("bert", 2))
    own = {name: layer._update("default").tau for name, layer in model.base_model._layers("default")}
    assert {name: tau.item() for name, tau in found.items()} == {name: tau.item() for name, tau in own.items()}
    assert CliRunner().invoke(main, ["inspect", str(tmp_path)]).exit_code == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"competition": "rows"}, "competition must be one of layer, model, budget; got 'rows'"),
        ({"sparsity": 0.0}, "sparsity must be above 0 with competition='model'"),
        ({"sparsity_pattern": {"query": 0.5}}, "sparsity_pattern must be empty with competition='model'"),
    ],
)
def test_settings_that_do_not_fit(settings, reason):
    with pytest.raises(ValueError, match=reason):
        config(**settings)


def test_what_would_break_the_competition_is_refused(model):
    with pytest.raises(ValueError, match="layers compete for it"):
        layers(model)[0].set_sparsity("default", 0.5)
    with pytest.raises(ValueError, match="must not have competition='model'"):
        SparsityBudget(model, BudgetSchedule(0.5, 0.9, 10))
    with pytest.raises(ValueError, match="competition must not be 'model' where a model mixes tuners"):
        get_peft_model(build("bert"), config(), mixed=True)
