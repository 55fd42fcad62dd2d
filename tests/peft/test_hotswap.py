"""Another adapter's factors, in place: the same bits as loading it, the same modules, the same compiled graph."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as pefts
from safetensors.torch import load_file, save_file
from small_models import adapted, batch, build, config, logits, train

from snell.peft import AdaptedLinear, hotswap_adapter, hotswap_adapter_from_state_dict, rescale_adapter_scale

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def saved(tmp_path):
    """A base, and the folders of two adapters of it, trained differently."""

    def save(**settings):
        base, inputs = build("llama"), batch("llama")
        for name, steps in (("one", 1), ("two", 3)):
            model = get_peft_model(copy.deepcopy(base), config(kernel="rbf", **settings))
            train(model, inputs, steps)
            model.save_pretrained(tmp_path / name)
        return base, tmp_path / "one", tmp_path / "two"

    return save


@pytest.mark.parametrize("init_weights", [False, "identity"])
def test_swapping_gives_the_bits_of_loading(saved, init_weights):
    base, one, two = saved(init_weights=init_weights)
    inputs = batch("llama")
    model = PeftModel.from_pretrained(copy.deepcopy(base), one).eval()
    target = logits(PeftModel.from_pretrained(copy.deepcopy(base), two).eval(), inputs)
    before = {name: id(p) for name, p in model.named_parameters()}
    assert not torch.equal(logits(model, inputs), target)
    hotswap_adapter(model, two, "default")
    assert torch.equal(logits(model, inputs), target)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    with pytest.raises(ValueError, match="only supports"):
        pefts(model, two, "default")


def test_a_compiled_model_is_not_compiled_again(saved):
    base, one, two = saved()
    inputs, graphs = {"input_ids": batch("llama")["input_ids"], "use_cache": False}, []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = PeftModel.from_pretrained(copy.deepcopy(base), one).eval()
    other = logits(PeftModel.from_pretrained(copy.deepcopy(base), two).eval(), inputs)
    compiled = torch.compile(model, backend=backend)
    y, compilations = logits(compiled, inputs), len(graphs)
    assert compilations
    hotswap_adapter(compiled, two, "default")
    torch.testing.assert_close(logits(compiled, inputs), other)
    assert len(graphs) == compilations
    hotswap_adapter(compiled, one, "default")
    assert torch.equal(logits(compiled, inputs), y)
    assert len(graphs) == compilations
    with rescale_adapter_scale(model, 0.5):  # what does change the graph is seen
        logits(compiled, inputs)
    assert len(graphs) > compilations


def test_sparsities_of_layers_come_and_go_with_their_adapter(saved):
    base, one, two = saved()
    model = PeftModel.from_pretrained(copy.deepcopy(base), two, is_trainable=True)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.set_sparsity("default", 0.5)
    model.save_pretrained(two)
    target = logits(model.eval(), inputs := batch("llama"))
    swapped = PeftModel.from_pretrained(copy.deepcopy(base), one).eval()
    first = logits(swapped, inputs)
    hotswap_adapter(swapped, two, "default")
    assert torch.equal(logits(swapped, inputs), target)
    hotswap_adapter(swapped, one, "default")
    assert torch.equal(logits(swapped, inputs), first)
    assert not any(layer._own_sparsity for layer in swapped.modules() if isinstance(layer, AdaptedLinear))


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"r": 8}, ValueError, r"\[24, 8\] in place of \[24, 4\]: adapters of other ranks"),
        ({"sparsity": 0.5}, ValueError, "sparsity must be that"),
        ({"scale": 3.0}, ValueError, "scale must be that"),
        ({"train_theta": False}, ValueError, "trains_theta must be that"),
        ({"init_weights": "identity"}, ValueError, "init_weights"),
        ({"target_modules": ["q_proj"]}, RuntimeError, r"missing \['base_model"),
        ({"target_modules": [*EVERY, "lm_head"]}, RuntimeError, r"unexpected \['base_model.model.lm_head"),
        ({"modules_to_save": ["lm_head"]}, ValueError, "modules_to_save must be unset"),
        ({"trainable_token_indices": [5]}, ValueError, "trainable_token_indices must be unset"),
        ({"bias": "snell_only"}, ValueError, "bias must be unset"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path, settings, error, reason):
    model, base = adapted("llama", kernel="rbf")
    get_peft_model(copy.deepcopy(base), config(**{"kernel": "rbf", **settings})).save_pretrained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=reason):
        hotswap_adapter(model, tmp_path, "default")
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_other_tuners_names_states_and_values_are_refused(tmp_path):
    model, base = adapted("llama")
    get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="must hold a SNELL adapter"):
        hotswap_adapter(model, tmp_path / "lora", "default")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'absent'"):
        hotswap_adapter(model, tmp_path, "absent")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaN"):
        hotswap_adapter(model, tmp_path, "default")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.merge_adapter()
    state = {key: value for key, value in model.state_dict().items() if "snell_" in key}
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])


def test_a_model_that_transformers_gave_the_adapter(saved):
    base, one, two = saved()
    model, inputs = copy.deepcopy(base), batch("llama")
    model.load_adapter(str(one))
    target = logits(PeftModel.from_pretrained(copy.deepcopy(base), two).eval(), inputs)
    tensors = load_file(two / "adapter_model.safetensors")
    state = {
        key.removeprefix("base_model.model.").replace(".weight", ".default.weight"): value
        for key, value in tensors.items()
    }
    hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    assert torch.equal(logits(model.eval(), inputs), target)
