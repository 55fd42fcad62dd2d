"""Adapters go to safetensors and come back; a checkpoint that does not fit is refused with the reason."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import BUILDERS, adapted, batch, build, config, logits, train
from torch import nn

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
        loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
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


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("missing", ["snell_A", "snell_B", "layers.1.mlp.down_proj"])
def test_missing_tensors_are_named_in_pefts_warning(missing, low_cpu_mem_usage, tmp_path):
    base, path = _save(tmp_path)
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if missing not in key}, path)
    with pytest.warns(UserWarning, match=rf"Found missing adapter keys while loading the checkpoint.*{missing}"):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_the_scalars_of_another_kernel_function_are_missing(tmp_path):
    base, _ = _save(tmp_path)
    _edit_config(tmp_path, kernel="sigmoid")
    with pytest.warns(UserWarning, match=r"Found missing adapter keys.*snell_theta"):
        PeftModel.from_pretrained(base, tmp_path)


def test_part_of_an_adapter_loads_where_the_caller_is_not_strict():
    model, twin = adapted("llama")[0], adapted("llama")[0]
    part = {key: value for key, value in model.state_dict().items() if "layers.0" in key and "snell_A" in key}
    untouched = {key: value.clone() for key, value in twin.state_dict().items()}
    result = twin.load_state_dict(part, strict=False)
    assert set(result.missing_keys) == untouched.keys() - part.keys()
    assert not result.unexpected_keys
    for key, value in twin.state_dict().items():
        assert torch.equal(value, {**untouched, **part}[key]), key
    with pytest.raises(RuntimeError, match=r"Missing key.*snell_B"):
        twin.load_state_dict(part)


def test_a_models_own_state_dict_round_trips_and_misses_nothing():
    model, _ = adapted("bert", kernel="rbf")
    twin, _ = adapted("bert", kernel="rbf")
    inputs = batch("bert")
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))


class TestNames:
    """Factors were named ``snell_A.default``, as parameters of a dictionary, and are now ``snell_A.default.weight``."""

    OLD = Path(__file__).with_name("adapter_of_old_names")

    def base(self) -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
        """The base model, and what it gave with the adapter when that was saved."""
        run = load_file(self.OLD / "run.safetensors")
        base = nn.Sequential(nn.Linear(10, 12), nn.GELU(), nn.Linear(12, 6))
        base.load_state_dict({key.removeprefix("base."): value for key, value in run.items() if "base." in key})
        return base, run

    def test_every_trained_parameter_is_a_leafs_weight(self):
        model, _ = adapted("bert", kernel="sigmoid")
        trained = [key for key, p in model.named_parameters() if p.requires_grad]
        assert all(key.endswith(".default.weight") for key in trained)
        leaves = {key for key, module in model.named_modules() if not list(module.children())}
        assert {key.removesuffix(".weight") for key in trained} <= leaves

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_an_adapter_of_old_names_loads_with_the_same_bits(self, low_cpu_mem_usage, recwarn):
        base, run = self.base()
        model = PeftModel.from_pretrained(base, self.OLD, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert not [warning for warning in recwarn if "adapter keys" in str(warning.message)]
        saved = load_file(self.OLD / "adapter_model.safetensors")
        assert len(saved) == 6
        for key, value in saved.items():
            assert torch.equal(model.get_parameter(f"{key}.default.weight"), value)
        torch.testing.assert_close(model(run["x"]), run["y"], rtol=1e-6, atol=1e-6)

    def test_it_is_saved_with_new_names(self, tmp_path):
        model = PeftModel.from_pretrained(self.base()[0], self.OLD)
        model.save_pretrained(tmp_path)
        old, new = (load_file(folder / "adapter_model.safetensors") for folder in (self.OLD, tmp_path))
        assert new.keys() == {f"{key}.weight" for key in old}
        assert all(torch.equal(new[f"{key}.weight"], value) for key, value in old.items())

    def test_a_models_state_dict_of_old_names_loads(self):
        model = PeftModel.from_pretrained(self.base()[0], self.OLD)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        old = {key.replace(".default.weight", ".default"): value for key, value in state.items()}
        assert old.keys() != state.keys()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(old, strict=True)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        # One layer alone, as some trainers load it.
        layer, prefix = model.get_submodule("base_model.model.0"), "base_model.model.0."
        layer.load_state_dict({key.removeprefix(prefix): v for key, v in old.items() if key.startswith(prefix)})
