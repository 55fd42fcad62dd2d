"""Adapters of kernel="mixture", whose softmax has three trained scalars, in what PEFT does with adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import batch, build, logits, train

from snell.peft import AdaptedLinear, SnellConfig


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(3)
    return build("bert")


def adapted(base, **settings):
    settings = {"r": 4, "kernel": "mixture", "gate": "magnitude", "target_modules": "all-linear", **settings}
    return get_peft_model(copy.deepcopy(base), SnellConfig(**settings))


def scalars(model):
    """alpha, beta and gamma by layer."""
    return [layer.snell_theta["default"].weight[-3:] for layer in model.modules() if isinstance(layer, AdaptedLinear)]


def test_its_scalars_are_trained_saved_and_loaded(base, tmp_path):
    model = adapted(base)
    before = [theta.clone() for theta in scalars(model)]
    train(model, batch("bert", 4), steps=3)
    assert all((after != start).all() for after, start in zip(scalars(model), before, strict=True))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    inputs = batch("bert", 3)
    assert torch.equal(logits(loaded.eval(), inputs), logits(model.eval(), inputs))


def test_it_merges_and_comes_out_bit_for_bit(base):
    model, inputs = adapted(base, init_weights=False).eval(), batch("bert", 3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = logits(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_an_identity_start_is_the_base_to_the_bit_and_trains(base):
    model, inputs = adapted(base, init_weights="identity"), batch("bert", 4)
    assert torch.equal(logits(model.eval(), inputs), logits(copy.deepcopy(base).eval(), inputs))
    train(model, inputs, steps=2)
    assert not torch.equal(logits(model.eval(), inputs), logits(copy.deepcopy(base).eval(), inputs))


def test_each_sample_of_a_batch_has_its_own_adapter(base):
    model, inputs = adapted(base, init_weights=False).eval(), batch("bert", 2)
    model.add_adapter("other", SnellConfig(r=2, target_modules="all-linear", init_weights=False))
    both = logits(model, {**inputs, "adapter_names": ["default", "other"]})
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        torch.testing.assert_close(both[row], logits(model, inputs)[row], rtol=1e-5, atol=1e-6)
