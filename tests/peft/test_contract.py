"""A SNELL model behaves as one of a tuner that ships with PEFT does."""

import copy
import os
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_model_status, get_peft_model, inject_adapter_in_model
from small_models import BUILDERS, adapted, batch, build, config, logits, train
from torch import nn

from snell import refresh_thresholds
from snell.peft import AdaptedLinear, SnellConfig, SnellModel

MODELS = pytest.mark.parametrize("name", list(BUILDERS))


def snell_layers(model: nn.Module) -> list[AdaptedLinear]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


@MODELS
def test_disabled_deleted_unmerged_and_unloaded_adapters_give_the_base_models_outputs_exactly(name):
    model, untouched = adapted(name)
    inputs = batch(name)
    base, tuned = logits(untouched, inputs), logits(model, inputs)
    assert not torch.equal(base, tuned)

    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), tuned)

    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), tuned)

    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), tuned)

    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model, inputs), base)  # a PeftModel without adapters refuses to run
    assert torch.equal(logits(model.unload(), inputs), base)


@MODELS
def test_training_moves_the_factors_alone_and_lowers_the_loss(name):
    model, _ = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = batch(name)
    loss = model(**inputs).loss.item()
    train(model, inputs, steps=10)
    assert model(**inputs).loss.item() < loss
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("snell_" not in key), key
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key in before if "snell_" in key}


@MODELS
def test_merge_and_unload_equals_the_adapted_model(name):
    model, untouched = adapted(name)
    inputs = batch(name)
    train(model, inputs)
    tuned = logits(model, inputs)
    merged = model.merge_and_unload(safe_merge=True)
    assert not snell_layers(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in untouched.modules()]
    torch.testing.assert_close(logits(merged, inputs), tuned, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_stays_close_to_the_base_model():
    # The published start is not the identity: its update is of the order of scale^2 / in_features.
    model, untouched = adapted("llama", init_weights=True, scale=0.1)
    inputs = batch("llama")
    base, fresh = logits(untouched, inputs), logits(model, inputs)
    assert not torch.equal(fresh, base)
    assert (fresh - base).abs().max() < 1e-2 * base.abs().max()
    # Without competition the identity exists, and the weights are the base's to the bit.
    exact, untouched = adapted("llama", init_weights="identity", sparsity=0.0, kernel="linear")
    for layer in snell_layers(exact):
        assert not layer.get_delta_weight("default").any()
    torch.testing.assert_close(logits(exact, inputs), logits(untouched, inputs), rtol=1e-6, atol=1e-6)


def test_adapters_are_added_switched_stacked_and_deleted():
    model, _ = adapted("bert")
    inputs = batch("bert")
    first = logits(model, inputs)
    model.add_adapter("second", config(r=6, sparsity=0.5, kernel="rbf"))
    assert torch.equal(logits(model, inputs), first)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".second." in key)

    model.set_adapter("second")
    second = logits(model, inputs)
    assert not torch.equal(second, first)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad and "snell_" in key}
    assert trainable
    assert all(key.endswith(".second.weight") for key in trainable)

    model.base_model.set_adapter(["default", "second"])
    both = logits(model, inputs)
    assert not torch.equal(both, first)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), both)

    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), first)
    assert all(layer._all_available_adapter_names() == ["default"] for layer in snell_layers(model))
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_batch_mixes_adapters(name):
    model, untouched = adapted(name)
    model.add_adapter("other", config())
    model.eval()
    inputs = batch(name, 3)
    names = ["other", "__base__", "default"]
    mixed = logits(model, inputs, adapter_names=names)
    for i, adapter in enumerate(names):
        if adapter == "__base__":
            alone = logits(untouched, inputs)
        else:
            model.set_adapter(adapter)
            alone = logits(model, inputs)
        torch.testing.assert_close(mixed[i], alone[i], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"^Trying to infer with non-existing adapter\(s\): nobody$"):
        logits(model, inputs, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match=r"^Cannot pass `adapter_names` when the model is in training mode\.$"):
        logits(model.train(), inputs, adapter_names=names)
    with pytest.raises(ValueError, match=r"^Length of `adapter_names` should be the same as the number of inputs, "):
        logits(model.eval(), inputs, adapter_names=names[:2])
    model.merge_adapter()
    with pytest.raises(
        ValueError,
        match=r"^Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first\.$",
    ):
        logits(model, inputs, adapter_names=names)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_mixes_adapters_in_a_batch(name, beams):
    model, _ = adapted(name, task_type="CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM")
    model.add_adapter("other", config())
    model.eval()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    inputs = {"input_ids": batch(name, 2)["input_ids"]}
    names = ["other", "default"]
    mixed = model.generate(**inputs, **settings, adapter_names=names)
    for i, adapter in enumerate(names):
        model.set_adapter(adapter)
        assert torch.equal(mixed[i], model.generate(**inputs, **settings)[i])


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_with_an_unmerged_adapter_equals_the_merged_models(name):
    model, _ = adapted(name)
    settings = {"max_new_tokens": 6, "do_sample": False}
    inputs = {"input_ids": batch(name, 2)["input_ids"]}
    tokens = model.generate(**inputs, **settings)
    assert torch.equal(model.merge_and_unload().generate(**inputs, **settings), tokens)


def test_patterns_layers_and_exclusions_choose_targets_ranks_and_sparsities():
    model, _ = adapted(
        "llama",
        target_modules=["q_proj", "v_proj", "down_proj"],
        exclude_modules=["1.self_attn.v_proj"],
        rank_pattern={"down_proj": 8, r"0\.self_attn\.q_proj": 2},
        sparsity_pattern={"q_proj": 0.25},
    )
    specs = {
        key.split("layers.")[1]: module.snell_spec["default"]
        for key, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }
    assert {key: (spec.rank, spec.sparsity) for key, spec in specs.items()} == {
        "0.self_attn.q_proj": (2, 0.25),
        "0.self_attn.v_proj": (4, 0.9),
        "0.mlp.down_proj": (8, 0.9),
        "1.self_attn.q_proj": (4, 0.25),
        "1.mlp.down_proj": (8, 0.9),
    }
    one, _ = adapted("llama", target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert [key for key, m in one.named_modules() if isinstance(m, AdaptedLinear)] == [
        "base_model.model.model.layers.1.self_attn.q_proj"
    ]


def test_targets_default_to_pefts_choice_for_the_model():
    model, _ = adapted("llama", target_modules=None)
    assert {key.split(".")[-1] for key, m in model.named_modules() if isinstance(m, AdaptedLinear)} == {
        "q_proj",
        "v_proj",
    }


def test_the_output_head_is_no_linear_target():
    model, _ = adapted("llama")
    assert not isinstance(model.base_model.model.lm_head, AdaptedLinear)
    assert len(snell_layers(model)) == 14


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model, untouched = adapted("bert", modules_to_save=["classifier"], task_type="SEQ_CLS")
    inputs = batch("bert")
    before = untouched.classifier.weight.clone()
    train(model, inputs)
    assert not torch.equal(model.base_model.model.classifier.weight, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_biases_train_where_asked_and_are_saved(tmp_path):
    if Version(peft.__version__) < Version("0.21"):
        with pytest.raises(ValueError, match=r"peft 0\.21"):
            adapted("bert", bias="all")
        return
    for bias in ("all", "snell_only"):
        model, untouched = adapted("bert", bias=bias, target_modules=["query", "key"])
        biases = {key: p.requires_grad for key, p in model.named_parameters() if key.endswith("bias")}
        assert any(biases.values())
        for key, requires_grad in biases.items():
            wanted = bias == "all" or any(name in key for name in ("query.base_layer", "key.base_layer"))
            assert requires_grad == wanted, key
        inputs = batch("bert")
        train(model, inputs)
        key = "bert.encoder.layer.0.attention.self.query.bias"
        moved = {k.replace("base_layer.", ""): p for k, p in model.base_model.model.named_parameters()}[key]
        assert not torch.equal(moved, dict(untouched.named_parameters())[key])
        model.save_pretrained(tmp_path / bias)
        loaded = PeftModel.from_pretrained(untouched, tmp_path / bias).eval()
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_status_helpers_understand_the_tuner():
    model, _ = adapted("vit", kernel="sigmoid")
    status = get_model_status(model)
    assert status.peft_types == {"default": "SNELL"}
    assert status.adapter_model_type == "SnellModel"
    assert status.requires_grad == {"default": True}
    assert status.num_adapter_layers == len(snell_layers(model))
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    layer = model.get_layer_status()[0]
    assert (layer.module_type, layer.available_adapters) == ("snell.AdaptedLinear", ["default"])


def test_injection_and_transformers_own_adapter_calls(tmp_path):
    model, untouched = adapted("llama")
    inputs = batch("llama")
    tuned, base = logits(model, inputs), logits(untouched, inputs)
    model.save_pretrained(tmp_path)

    native = copy.deepcopy(untouched)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native.eval(), inputs), tuned)
    native.disable_adapters()
    assert torch.equal(logits(native, inputs), base)
    native.enable_adapters()
    native.add_adapter(config(), adapter_name="second")
    native.set_adapter("second")
    assert not torch.equal(logits(native.eval(), inputs), tuned)
    native.set_adapter("default")
    assert torch.equal(logits(native, inputs), tuned)
    native.save_pretrained(tmp_path / "native")
    again = copy.deepcopy(untouched)
    again.load_adapter(str(tmp_path / "native"))
    assert torch.equal(logits(again.eval(), inputs), tuned)

    injected = inject_adapter_in_model(config(), copy.deepcopy(untouched))
    assert len(snell_layers(injected)) == 14


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.pool = nn.Embedding(5, 8, max_norm=1.0), nn.MaxPool2d(3)
        self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("target", "error", "reason"),
    [
        ("embedding", ValueError, "max_norm"),
        (
            "pool",
            TypeError,
            "MaxPool2d; SNELL adapts torch.nn.Linear, Embedding, Conv1d, Conv2d, Conv3d, transformers'",
        ),
        ("attention", TypeError, "MultiheadAttention"),
        ("attention.out_proj", ValueError, "never calls"),
        ("missing", ValueError, "missing"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused_with_the_reason(target, error, reason):
    with pytest.raises(error, match=reason):
        get_peft_model(Embedded(), SnellConfig(target_modules=[target]))


def test_fan_in_fan_out_is_known_by_itself_and_corrected_with_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for setting in (False, True):
            model, _ = adapted("gpt2", fan_in_fan_out=setting)
            assert all(layer.fan_in_fan_out for layer in snell_layers(model))
    with pytest.warns(UserWarning, match=r"fan_in_fan_out is True, but the target is a torch\.nn\.Linear") as caught:
        model, _ = adapted("llama", fan_in_fan_out=True)
    assert sum("fan_in_fan_out" in str(warning.message) for warning in caught) == 1
    assert not any(layer.fan_in_fan_out for layer in snell_layers(model))


def test_factors_stay_in_float32_whatever_the_models_dtype():
    model = get_peft_model(build("llama").to(torch.bfloat16), config())
    assert all(p.dtype == torch.float32 for key, p in model.named_parameters() if "snell_" in key)
    model.to(torch.float16)
    assert all(p.dtype == torch.float32 for key, p in model.named_parameters() if "snell_" in key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_adapter_dtype_false_rounds_the_factors_to_the_bases_dtype(dtype, tmp_path):
    torch.manual_seed(3)
    base = build("llama").to(dtype)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, config(kernel="sigmoid"), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    inputs = batch("llama")
    # Who survives is decided in float32, among the rounded factors.
    layer = snell_layers(model)[0]
    update = layer._update("default")
    assert update.A.dtype == torch.float32
    assert torch.equal(update.A, layer.snell_A["default"].weight.float())
    assert refresh_thresholds(model) == len(snell_layers(model))
    model.zero_grad()
    model(**inputs).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    model.add_adapter("full", config())
    assert {p.dtype for key, p in model.named_parameters() if ".full." in key} == {torch.float32}

    model.save_pretrained(tmp_path)
    for settings in (
        {},
        {"autocast_adapter_dtype": False},
        {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True},
    ):
        loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path, **settings)
        expected = dtype if settings else torch.float32
        assert {p.dtype for key, p in loaded.named_parameters() if "snell_" in key} == {expected}
        assert torch.equal(logits(loaded.eval(), inputs), logits(model.eval(), inputs))


def test_the_rounded_factors_of_a_float32_base_are_not_rounded():
    model = get_peft_model(build("llama"), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_importing_snell_needs_neither_peft_nor_transformers():
    probe = (
        "import sys; sys.modules['peft'] = sys.modules['transformers'] = None; import snell\n"
        "try:\n    import snell.peft\nexcept ImportError as error:\n    print(error)"
    )
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=os.environ, check=True)
    assert "pip install 'peft>=0.20' 'transformers>=5.17'" in answer.stdout


def test_the_tuner_is_what_pefts_registry_holds():
    model, _ = adapted("vit")
    assert isinstance(model.base_model, SnellModel)
    assert str(model.peft_type).endswith("SNELL")
