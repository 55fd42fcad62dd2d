"""Adapters go to safetensors and come back; a checkpoint that does not fit is refused with the reason."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import BUILDERS, adapted, batch, build, config, logits, train

KERNELS = ("piecewise_linear", "linear", "sigmoid", "rbf")


@pytest.mark.parametrize("name", list(BUILDERS))
def test_train_save_and_load_give_the_same_outputs_bit_for_bit(name, tmp_path):
    model, untouched = adapted(name)
    inputs = batch(name)
    train(model, inputs)
    tuned = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(logits(loaded.eval(), inputs), tuned)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("train_theta", [True, False])
def test_every_kernel_function_round_trips(kernel, train_theta, tmp_path):
    model, untouched = adapted("llama", kernel=kernel, train_theta=train_theta, scale=0.3)
    inputs = batch("llama")
    train(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("snell_theta" in key for key in saved) == (train_theta and kernel != "linear")


def test_loading_on_the_meta_device_gives_the_same_outputs(tmp_path):
    model, untouched = adapted("gpt2")
    inputs = batch("gpt2")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_a_half_precision_model_round_trips_bit_for_bit(tmp_path):
    base = build("llama").to(torch.bfloat16)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, config())
    inputs = batch("llama")
    train(model, inputs)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(untouched), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False
        )
        assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))


def test_a_loaded_adapter_trains_on_where_asked(tmp_path):
    model, untouched = adapted("bert", kernel="sigmoid")
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(untouched, tmp_path, is_trainable=True).eval()
    names = {key for key, p in twin.named_parameters() if p.requires_grad}
    assert names == {key for key, p in model.named_parameters() if p.requires_grad}
    inputs = batch("bert")
    for one in (model, twin):
        torch.manual_seed(5)
        train(one, inputs)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))


def test_several_adapters_load_into_one_model(tmp_path):
    model, untouched = adapted("llama")
    model.add_adapter("second", config(r=6))
    inputs = batch("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    loaded.load_adapter(tmp_path / "second", "another name")
    for ours, theirs in (("default", "default"), ("second", "another name")):
        model.set_adapter(ours)
        loaded.set_adapter(theirs)
        assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))


def _save(tmp_path, **settings):
    model, untouched = adapted("llama", **settings)
    model.save_pretrained(tmp_path)
    return untouched, tmp_path / "adapter_model.safetensors"


def _edit_config(tmp_path, **changes) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
class TestACheckpointThatDoesNotFitIsRefused:
    def test_of_another_rank(self, tmp_path, low_cpu_mem_usage):
        base, _ = _save(tmp_path)
        _edit_config(tmp_path, r=8)
        with pytest.raises((RuntimeError, ValueError), match=r"snell_A[\s\S]*24, 4[\s\S]*24, 8"):
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    def test_of_other_shapes(self, tmp_path, low_cpu_mem_usage):
        base, path = _save(tmp_path)
        tensors = load_file(path)
        key = next(key for key in tensors if "snell_B" in key)
        save_file({**tensors, key: tensors[key][:-1].clone()}, path)
        with pytest.raises((RuntimeError, ValueError), match="snell_B"):
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_that_is_not_finite(self, tmp_path, low_cpu_mem_usage, value):
        base, path = _save(tmp_path)
        tensors = load_file(path)
        key = next(key for key in tensors if "snell_A" in key)
        tensors[key][2, 1] = value
        save_file(tensors, path)
        with pytest.raises(RuntimeError, match="NaN or infinite"):
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    @pytest.mark.parametrize("missing", ["snell_A", "snell_B", "layers.1.mlp.down_proj"])
    def test_with_missing_tensors(self, tmp_path, low_cpu_mem_usage, missing):
        base, path = _save(tmp_path)
        tensors = load_file(path)
        save_file({key: value for key, value in tensors.items() if missing not in key}, path)
        with pytest.raises(RuntimeError, match="missing from the checkpoint"):
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    def test_of_another_kernel_function(self, tmp_path, low_cpu_mem_usage):
        base, _ = _save(tmp_path)
        _edit_config(tmp_path, kernel="sigmoid")
        with pytest.raises(RuntimeError, match=r"snell_theta.*missing from the checkpoint"):
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_models_own_state_dict_round_trips_and_misses_nothing():
    model, _ = adapted("bert", kernel="rbf")
    twin, _ = adapted("bert", kernel="rbf")
    inputs = batch("bert")
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))
