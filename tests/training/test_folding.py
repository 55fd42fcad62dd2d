"""A folded layer costs what its base layer costs, gives its weight back bit for bit, and is saved as if not folded."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import batch, build, logits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tuned import TUNERS, adamw, freezing, step, tuned

from snell.functional import dense
from snell.peft import AdaptedLinear
from snell.training.folding import can_fold


def folded(tuner="snell", name="llama", model=None):
    """A model trained for a step, all of whose adapters are then folded; with its state before."""
    model, inputs = tuned(tuner, name) if model is None else model, batch(name, 4)
    optimizer = adamw(model)
    step(model, optimizer, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model.eval(), inputs)
    frozen = freezing(model.train(), optimizer, batch=inputs, threshold=1.0, end=0.1)
    assert frozen.check(1) == frozen.folded
    assert len(frozen.folded) == len(frozen.adapters)
    return model.eval(), inputs, frozen, before, expected


def weights(model):
    return {key: p.detach() for key, p in model.named_parameters()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2: weights stored [n, m]
@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_it_unfolds_bit_for_bit(tuner, name):
    model, inputs, frozen, before, expected = folded(tuner, name)
    changed = [key for key, p in weights(model).items() if not torch.equal(p, before[key])]
    assert len(changed) == len(frozen.adapters)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    frozen.unfold()
    assert frozen.folded == []
    assert_equal(weights(model), {key: before[key] for key in weights(model)})
    assert_equal({"": logits(model, inputs)}, {"": expected})
    assert not any(layer._forward_pre_hooks or layer._state_dict_hooks for layer in frozen.adapters.values())


@pytest.mark.parametrize("tuner", ["dora", "ia3"])
def test_other_tuners_fold_as_they_merge(tuner):
    model, inputs, frozen, before, expected = folded(tuner)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    frozen.unfold()
    assert_equal(weights(model), {key: before[key] for key in weights(model)})


def test_a_folded_snell_layer_holds_what_it_computed():
    _, _, frozen, before, _ = folded()
    for name, layer in frozen.adapters.items():
        assert isinstance(layer, AdaptedLinear)
        base = before[f"{name}.base_layer.weight"]
        assert torch.equal(layer.base_layer.weight, dense(layer._update("default"), weight=base))


@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_a_folded_model_does_the_products_of_its_base(tuner):
    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        return counter.get_flop_counts()["Global"]

    model, inputs, *_ = folded(tuner)
    assert flops(model) == flops(build("llama"))
    selected = []
    if tuner == "snell":
        for layer in model.modules():
            if isinstance(layer, AdaptedLinear):
                layer._update = selected.append  # what selects and merges
        model(**inputs)
    assert selected == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_saving_saves_the_adapter_and_the_base_as_it_was(tuner, name, tmp_path):
    base = build(name)
    wrapped = get_peft_model(copy.deepcopy(base), TUNERS[tuner]()).train()
    model, inputs, frozen, before, expected = folded(name=name, model=wrapped)
    assert_equal(dict(model.state_dict()), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded.eval(), inputs), expected)
    assert frozen.folded  # saving unfolds nothing


@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_disabling_the_adapters_gives_the_base_to_the_bit(tuner):
    base = build("llama")
    model, inputs, frozen, before, expected = folded(model=get_peft_model(copy.deepcopy(base), TUNERS[tuner]()).train())
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base, inputs))
    assert torch.equal(logits(model, inputs), expected)
    assert frozen.folded == []
    assert_equal(weights(model), {key: before[key] for key in weights(model)})


@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_loading_into_folded_layers_loads(tuner):
    model, inputs, _, _, _ = folded(tuner)
    other, _, _, state, _ = folded(tuner)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model, inputs), logits(other, inputs), rtol=1e-4, atol=1e-5)
    assert_equal(weights(model), {key: state[key] for key in weights(model)})
    # And once more, with nothing to unfold: what was loaded stays.
    model.load_state_dict({}, strict=False)
    assert_equal(weights(model), {key: state[key] for key in weights(model)})


@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_a_copy_of_a_folded_model_is_one_of_its_own(tuner):
    model, inputs, frozen, before, _ = folded(tuner)
    twin = copy.deepcopy(model)
    frozen.unfold()
    assert_equal(dict(twin.state_dict()), before)
    with twin.disable_adapter():
        logits(twin, inputs)
    assert_equal(weights(twin), {key: before[key] for key in weights(twin)})


@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_merge_and_unload_takes_the_folded_weights(tuner):
    model, inputs, _, _, _ = folded(tuner)
    expected = logits(model, inputs)
    plain = model.merge_and_unload()
    assert not any("lora" in key or "snell" in key for key in plain.state_dict())
    assert torch.equal(logits(plain.eval(), inputs), expected)


@pytest.mark.parametrize("device_copy", ["snell", "lora"])
def test_what_a_fold_keeps(device_copy):
    _, _, frozen, _, _ = folded(device_copy)
    for name, fold in frozen._folds.items():
        layer = frozen.adapters[name]
        m, n = layer.base_layer.weight.shape
        if device_copy == "lora":
            assert {key: value.shape for key, value in fold.base.items()} == {"weight": (m, n)}
            assert fold.base["weight"].device.type == "cpu"
        else:
            assert fold.base == {}
            assert sum(t.numel() for t in layer._merged["default"].replaced) == m * n - -(-m * n * 9 // 10)


def test_weights_that_others_use_or_that_train_are_not_folded():
    base = build("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    targets = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    embedded = base.model.embed_tokens.weight.clone()
    frozen = freezing(model, adamw(model), threshold=1.0, end=0.1)
    assert len(frozen.check(1)) == 3
    assert frozen.folded == ["base_model.model.model.layers.1.mlp.up_proj"]
    assert torch.equal(base.model.embed_tokens.weight, embedded)
    assert not frozen.done


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.word, self.out = nn.Conv2d(1, 6, 3), nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x, words):
        return self.out(self.conv(x).mean((2, 3)) + self.word(words).mean(1))


def test_convolutions_and_embeddings_freeze_and_fold_too():
    config = LoraConfig(r=2, target_modules=["conv", "word", "out"], init_lora_weights=False)
    model, inputs = get_peft_model(Picture(), config), (torch.randn(8, 1, 5, 5), torch.randint(9, (8, 4)))
    before, expected = {key: value.clone() for key, value in model.state_dict().items()}, model(*inputs)
    frozen = freezing(model, adamw(model), batch=inputs, threshold=1.0, end=0.1)
    assert len(frozen.check(1)) == len(frozen.folded) == 3
    assert all(0 < importance < 1 for importance in frozen.importances.values())
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
    frozen.unfold()
    assert_equal(dict(model.state_dict()), before)


class _Packed(nn.Parameter):
    """A parameter whose class gives its numbers another meaning, as quantised ones do."""


@pytest.mark.parametrize(
    "weight",
    [_Packed(torch.ones(3, 4), requires_grad=False), nn.Parameter(torch.ones(3, 4).char(), requires_grad=False)],
)
def test_only_plain_float_weights_can_be_folded(weight):
    base = nn.Sequential(nn.Linear(4, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert can_fold(layer, model)
    layer.base_layer.weight = weight
    assert type(layer.base_layer.weight) is type(weight)
    assert not can_fold(layer, model)
