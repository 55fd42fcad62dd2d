"""The demonstration, in a few steps: every room of it runs, and its measures measure what they say."""

import json
import statistics

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from snell import SnellLinear
from snell.bench.digits import CLASSES, RANK, Images, draw_few, load_domains, new_vit, shown_layer, train
from snell.bench.experiments.demo import METHODS, Settings, costs, reload_merged, run, weight_change
from snell.bench.memory import num_trained

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def domains():
    return load_domains()


class Head(nn.Module):
    """Called as the transformers models are, with little enough in it to count by hand."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, pixel_values):
        return type("Output", (), {"logits": self.body(pixel_values.flatten(1))})()


def test_no_image_stands_in_two_splits(domains):
    source = torch.cat([domains.source_train.pixels, domains.source_test.pixels])
    assert len(source) + sum(len(part) for part in domains[2:]) == 1797
    # Turned back and inverted back, a target image is its original but for the noise; compare it with every source.
    target = torch.cat([part.pixels for part in domains[2:]])
    original = -target.rot90(-1, (2, 3))
    nearest = torch.cdist(original.flatten(1), source.flatten(1)).amin(1) / 8  # RMS over 64 pixels
    # Noise alone would leave about 0.2; the nearest of the dataset's distinct images mostly lies further off.
    assert nearest.median() > 0.3


def test_both_domains_are_the_same_at_every_call(domains):
    for first, second in zip(domains, load_domains(), strict=True):
        assert torch.equal(first.pixels, second.pixels)
        assert torch.equal(first.labels, second.labels)


def test_few_labels_are_as_many_of_each_digit_and_differ_with_the_seed(domains):
    few, other = (draw_few(domains.target_pool, 10, seed) for seed in (0, 1))
    assert few.labels.bincount(minlength=CLASSES).tolist() == [10] * CLASSES
    assert not torch.equal(few.pixels, other.pixels)


def test_every_method_tries_as_many_learning_rates():
    assert len({len(method.rates) for method in METHODS}) == 1


def test_methods_train_what_they_say():
    pretrained = new_vit()
    head = 64 * CLASSES + CLASSES
    linears = [m for name, m in pretrained.named_modules() if isinstance(m, nn.Linear) and name != "classifier"]
    low_rank = sum(RANK * (m.in_features + m.out_features) for m in linears)
    expected = {
        "linear probe": head,
        "full fine-tuning": sum(p.numel() for p in pretrained.parameters()),
        "LoRA (PEFT)": low_rank + head,
        "SNELL": low_rank + head,
    }
    assert {name: num_trained(method.build(pretrained)) for name, method in BY_NAME.items()} == expected


def test_training_leaves_the_frozen_backbone_alone(domains):
    pretrained = new_vit()
    model = BY_NAME["SNELL"].build(pretrained)
    train(model, domains.target_pool, rate=0.1, steps=3, seed=0)
    frozen = dict(pretrained.named_parameters())
    compared = [name for name, p in model.named_parameters() if name in frozen and "classifier" not in name]
    assert len(compared) == len(frozen) - 2
    for name in compared:
        assert torch.equal(model.get_parameter(name), frozen[name]), name


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    batch = Images(torch.randn(5, 1, 8, 8), torch.randint(CLASSES, (5,)))
    # Both layers keep their input (a view of the batch, then the hidden values, which ReLU keeps as well);
    # cross entropy keeps its log-probabilities, the labels and one number for their weights' sum.
    body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    expected = 4 * 5 * (64 + 32 + CLASSES) + 8 * 5 + 4
    cost = costs({"": Head(body)}, batch, repetitions=1)[""]
    assert cost["saved_bytes"] == expected
    assert cost["step_seconds"] > 0


def test_the_shown_update_is_what_the_layer_adds(domains):
    pretrained = new_vit()
    layer = shown_layer(pretrained)
    x = torch.randn(3, 64)
    for name in ("full fine-tuning", "LoRA (PEFT)", "SNELL"):
        model = BY_NAME[name].build(pretrained)
        train(model, domains.target_pool, rate=0.03, steps=2, seed=0)
        change = weight_change(model, pretrained, layer)
        tuned = next(m for n, m in model.named_modules() if n.endswith(layer))
        base = pretrained.get_submodule(layer)
        bias = tuned.bias if name == "full fine-tuning" else base.bias
        expected = x @ (base.weight + change).T + bias
        # 64 products of order 1 and below, summed in float32.
        torch.testing.assert_close(tuned(x), expected, rtol=1e-5, atol=1e-5)
        assert change.any()


def test_a_model_that_loads_wrongly_is_caught(domains, tmp_path, monkeypatch):
    model = BY_NAME["SNELL"].build(new_vit()).eval()
    train(model, domains.target_pool, rate=0.1, steps=3, seed=0)
    assert reload_merged(model, tmp_path, domains.target_test) < 1e-4
    plain = SnellLinear.to_linear

    def without_update(layer):
        linear = plain(layer)
        linear.weight.data.copy_(layer.weight)
        return linear

    monkeypatch.setattr(SnellLinear, "to_linear", without_update)
    with pytest.raises(AssertionError):
        reload_merged(model, tmp_path, domains.target_test)


def test_the_demonstration_from_end_to_end(tmp_path, capsys):
    settings = Settings(pretraining_steps=3, steps=2, seeds=(0, 1), timed_steps=1)
    methods = [method._replace(rates=method.rates[:2]) for method in METHODS]
    run(tmp_path, settings, methods)
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "demo.json").read_text())
    assert [row["method"] for row in written["methods"]] == list(BY_NAME)
    for row in written["methods"]:
        means = [statistics.fmean(tried) for tried in row["validation"]]
        assert means[row["rates"].index(row["rate"])] == max(means)
        mean, spread = statistics.fmean(row["test"]), statistics.stdev(row["test"])
        assert f"| {row['method']} | {mean:.1f} ± {spread:.1f} | {row['trainable']:,} |" in printed
        assert row["step_seconds"] > 0
    assert written["reloaded_max_logit_difference"] < 1e-4
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert (tmp_path / "demo_model" / "model.safetensors").exists()
