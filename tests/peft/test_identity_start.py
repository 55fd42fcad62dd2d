"""Adapters that start as the identity: a fresh one gives the base's outputs to the bit, a saved one is drawn again."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import BUILDERS, adapted, batch, build, config, logits, train
from torch import nn

from snell.cli import main
from snell.cli.adapter import read
from snell.cli.survivors import spread
from snell.peft import AdaptedLinear, SnellConfig

IDENTITY = {"init_weights": "identity", "scale": None, "sparsity": 0.7}


def layers(model: nn.Module) -> list[AdaptedLinear]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in batch(name).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_fresh_adapter_gives_the_bases_outputs_to_the_bit_and_trains(name, dtype):
    base = build(name).to(dtype)
    inputs = inputs_of(name, dtype)
    before = logits(base, inputs)
    model = get_peft_model(base, config(**IDENTITY)).eval()
    assert logits(model, inputs).equal(before)
    with model.disable_adapter():
        assert logits(model, inputs).equal(before)
    model(**inputs).loss.backward()
    assert all(p.grad.any() for key, p in model.named_parameters() if "snell_" in key)
    train(model, inputs)
    assert not logits(model, inputs).equal(before)


def test_dpo_starts_at_the_logarithm_of_two():
    """Its loss compares log-probabilities with the adapter on and off."""
    model, _ = adapted("llama", **IDENTITY)
    chosen, rejected = batch("llama"), batch("llama")

    def margin() -> torch.Tensor:
        sums = []
        for answers in (chosen, rejected):
            tokens = answers["input_ids"]
            picked = logits(model, answers)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])
            sums.append(picked.sum((1, 2)))
        return sums[0] - sums[1]

    with model.disable_adapter():
        reference = margin()
    loss = -nn.functional.logsigmoid(0.1 * (margin() - reference)).mean()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("kernel", ["piecewise_linear", "sigmoid"])
def test_a_saved_adapter_loads_with_the_same_bits_and_holds_no_start(kernel, tmp_path):
    model, untouched = adapted("bert", **IDENTITY, kernel=kernel, init_seed=5, sparsity_pattern={"query": 0.0})
    inputs = batch("bert")
    train(model, inputs)
    tuned = logits(model, inputs)
    model.save_pretrained(tmp_path)
    names = {key.split("snell_")[1] for key in load_file(tmp_path / "adapter_model.safetensors") if "snell_" in key}
    assert names == {"A.weight", "B.weight", *(["theta.weight"] if kernel == "sigmoid" else [])}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_seed"] == 5
    state = untouched.state_dict()
    for low_cpu_mem_usage in (False, True):
        base = build("bert")
        base.load_state_dict(state)
        torch.manual_seed(1)
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert logits(again, inputs).equal(tuned)
    wrong = json.loads((tmp_path / "adapter_config.json").read_text()) | {"init_seed": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(wrong))
    base = build("bert")
    base.load_state_dict(state)
    assert not logits(PeftModel.from_pretrained(base, tmp_path), inputs).equal(tuned)


def test_merging_changes_nothing_at_first_and_gives_the_tuned_model_later():
    model, untouched = adapted("gpt2", **IDENTITY)
    inputs = batch("gpt2")
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    model.merge_adapter()
    assert logits(model, inputs).equal(logits(untouched, inputs))
    model.unmerge_adapter()
    train(model, inputs)
    tuned = logits(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), tuned, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert all(t.equal(weights[key]) for key, t in model.state_dict().items() if "snell_" not in key)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, inputs), tuned, rtol=1e-5, atol=1e-5)


def test_where_the_update_is_added_to_the_output_a_fresh_one_adds_nothing():
    """Dropout, several active adapters, and adapters by sample."""
    model, untouched = adapted("llama", **IDENTITY, dropout=0.5)
    model.add_adapter("second", config(**IDENTITY, kernel="rbf", gate="hard"))
    inputs = batch("llama")
    expected = logits(untouched, inputs)
    model.train()
    assert logits(model, inputs).equal(expected)
    model.eval()
    assert logits(model, inputs, adapter_names=["default", "second", "__base__"]).equal(expected)
    model.base_model.set_adapter(["default", "second"])
    assert logits(model, inputs).equal(expected)
    model.delete_adapter("second")
    assert all("second" not in layer.snell_start for layer in layers(model))


def test_without_competition_and_with_a_dot_product_b_starts_at_zero_as_before():
    settings = {"init_weights": "identity", "sparsity": 0.0, "kernel": "linear"}
    model, _ = adapted("vit", **settings)
    for layer in layers(model):
        assert layer.snell_start == {"default": None}
        assert not layer.snell_B["default"].weight.any()
    config = SnellConfig(**settings).to_dict()
    del config["init_seed"]  # as saved by releases without it
    assert SnellConfig.from_peft_type(**{k: v for k, v in config.items() if k != "peft_version"}).init_seed == 0


@pytest.mark.parametrize("kernel", ["piecewise_linear", "sigmoid"])
def test_a_change_of_dtype_and_empty_tensors_keep_the_start(kernel):
    model, untouched = adapted("llama", **IDENTITY | {"scale": 0.1, "kernel": kernel})  # 0.1 is no float32 number
    inputs = batch("llama")
    double = logits(untouched.double(), inputs)
    assert logits(model.double(), inputs).equal(double)
    with torch.device("meta"):
        empty = get_peft_model(build("llama"), config(**IDENTITY))
    empty = empty.to_empty(device="cpu")
    model, _ = adapted("llama", **IDENTITY)
    train(model, inputs)
    empty.load_state_dict(model.state_dict())
    for one, other in zip(layers(empty), layers(model), strict=True):
        assert one.get_delta_weight("default").equal(other.get_delta_weight("default"))


def test_inspect_counts_the_entries_that_change(tmp_path):
    model, _ = adapted("bert", **IDENTITY)
    model.save_pretrained(tmp_path)
    assert [spread(update).count for _, update in read(tmp_path).updates()] == [0] * len(layers(model))
    train(model, batch("bert"))
    model.save_pretrained(tmp_path)
    by_name = dict(read(tmp_path).updates())
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, AdaptedLinear):
            changed = int(layer.get_delta_weight("default").count_nonzero())
            assert 0 < spread(by_name[name]).count == changed <= 2 * 0.3 * layer.in_features * layer.out_features + 2
    out = CliRunner().invoke(main, ["inspect", str(tmp_path), "--out", str(tmp_path / "out")]).output
    assert "the adapter subtracts the update it started with" in out
