"""The model benchmark's methods tune what they say, and its figures are those of a training step."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from snell.bench import names
from snell.bench.contenders import ADAPT, Published, targets
from snell.bench.experiments import models
from snell.bench.memory import counted_peak_bytes, held_tensors, num_trained, storage_bytes, trained
from snell.bench.names import METHODS
from snell.bench.paper import steps
from snell.bench.workloads import MODELS, Training, Workload, vit
from snell.peft import SnellConfig

#: Layers of 40 x 40 and 40 x 80: where s * m * n is whole, the published quantile leaves the survivors that we do.
SIZES = {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
RANK = 4

#: The four attention layers and the two of the MLP, of both blocks.
LOW_RANK = 2 * RANK * (4 * (40 + 40) + 2 * (40 + 80))


def tiny_vit(device: str = "cpu") -> Workload:
    return vit("ViT-B/16", device, images=2, **SIZES)


def tuned(method: str) -> Training:
    torch.manual_seed(0)
    return Training(method, tiny_vit(), RANK)


@pytest.fixture(scope="module")
def result() -> dict:
    return models.measure_model(tiny_vit, "cpu", RANK, repetitions=3)


def test_the_targets_are_those_of_pefts_own_all_linear() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "image_size"}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, **sizes))
    names = set(targets(model))
    adapted = get_peft_model(model, SnellConfig(r=RANK, target_modules="all-linear")).get_base_model()
    assert {name.removesuffix(".base_layer") for name, _ in adapted.named_modules() if "base_layer" in name} == names
    assert "lm_head" not in names
    assert "classifier" not in targets(tiny_vit().model)


@pytest.mark.parametrize("method", ["snell", "lora", "shira", "published"])
def test_low_rank_methods_and_shira_train_as_many_numbers(method: str) -> None:
    assert num_trained(tuned(method).model) == LOW_RANK


def test_dora_also_trains_a_magnitude_a_row_and_full_tuning_everything() -> None:
    assert num_trained(tuned("dora").model) == LOW_RANK + 2 * (5 * 40 + 80)
    _, model, _ = tiny_vit()
    assert num_trained(tuned("full").model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_what_is_trained_and_nothing_else(method: str) -> None:
    training = tuned(method)
    before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
    training.step()
    moved = {name for name, parameter in training.model.named_parameters() if not parameter.equal(before[name])}
    assert moved
    assert moved <= {name for name, parameter in training.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_adamw_keeps_two_numbers_for_each_trained_one(method: str) -> None:
    training = tuned(method)
    parameters = trained(training.model)
    expected = sum(2 * parameter.nbytes for parameter in parameters) + 4 * len(parameters)  # and a step count each
    assert training.held()["optimizer_bytes"] == expected
    training.step()
    assert training.held()["optimizer_bytes"] == expected


def test_what_shira_holds_includes_its_indices() -> None:
    model = tuned("shira").model
    parameters = storage_bytes(model.parameters())
    assert storage_bytes(held_tensors(model)) == parameters + LOW_RANK * 2 * 4  # a row and a column, int32


def test_published_and_ours_agree_on_the_same_factors_by_the_magnitude_gate() -> None:
    torch.manual_seed(0)
    _, model, batch = tiny_vit()
    published = ADAPT["published"](copy.deepcopy(model), RANK)
    config = SnellConfig(r=RANK, gate="magnitude", scale=0.1, target_modules=set(targets(model)))
    ours = get_peft_model(model, config)
    with torch.no_grad():
        plain = published(**batch).logits
        for name, layer in published.named_modules():
            if isinstance(layer, Published):
                for factor in (layer.A, layer.B):
                    factor.mul_(8)  # an update as large as the weights
                adapted = ours.get_base_model().get_submodule(name)
                adapted.snell_A["default"].weight.copy_(layer.A)
                adapted.snell_B["default"].weight.copy_(layer.B)
        expected, got = published(**batch).logits, ours(**batch).logits
    assert (expected - plain).norm() > 1e-2 * plain.norm()
    # float32 sums in another order, through two blocks
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_every_method_has_every_figure(result: dict) -> None:
    assert set(result["methods"]) == set(METHODS)
    for entry in result["methods"].values():
        assert entry["seconds"] > 0
        assert entry["ratio_to_lora"] > 0
        assert entry["saved_bytes"] > 0
    assert result["methods"]["lora"]["ratio_to_lora"] == 1
    assert result["methods"]["lora"]["repetitions"] == 3
    assert len(models.tables({"models": [result]}).splitlines()) == 2 + len(METHODS)


def test_a_step_of_full_tuning_holds_a_gradient_of_every_weight_and_loras_does_not() -> None:
    weights = tuned("full").held()["model_bytes"]
    assert counted_peak_bytes(tuned("full").step) - counted_peak_bytes(tuned("lora").step) > 0.5 * weights


def test_all_memory_of_training_is_model_state_and_step(result: dict) -> None:
    entry = {"model_bytes": 100, "optimizer_bytes": 20, "extra_peak_bytes": 3}
    assert models.training_bytes(entry) == 123
    full = result["methods"]["full"]
    assert full["optimizer_bytes"] >= 2 * full["model_bytes"]


def test_a_method_that_raises_is_reported_and_the_picture_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(model: nn.Module, rank: int) -> nn.Module:
        raise RuntimeError("quantile() input tensor is too large")

    monkeypatch.setitem(ADAPT, "published", refuse)
    broken = models.measure_model(tiny_vit, "cpu", RANK, repetitions=1, methods=("lora", "published"))
    assert broken["methods"]["published"] == {"error": "quantile() input tensor is too large"}
    assert "**raises** quantile()" in models.tables({"models": [broken]})
    models.draw(tmp_path / "models.png", {"models": [broken]})
    assert (tmp_path / "models.png").stat().st_size > 10_000


def test_the_papers_ratio_stands_beside_ours(result: dict) -> None:
    entry = {"command": "snell bench steps", "machine": {"cpu": "a CPU", "threads": 1, "torch": "2"}}
    text = steps.report(entry | {"models": [result]})
    assert f"{result['methods']['snell']['ratio_to_lora']:.2f} times LoRA-8's" in text
    assert "1.26 times" in text


def test_the_command_line_offers_the_models_and_methods_there_are() -> None:
    assert tuple(MODELS) == names.MODELS
    assert ADAPT.keys() == METHODS.keys() | names.RED_METHODS.keys()
