"""RED on quantised bases, which it needs the outputs of alone; merging quantises the scaled weight anew."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import logits, train
from test_quantised import STEP, dense, inputs
from test_quantised import quantised as quantised

from snell.peft import EditedLinear, RedConfig


def edited(model: torch.nn.Module) -> list[EditedLinear]:
    return [module for module in model.modules() if isinstance(module, EditedLinear)]


def test_a_quantised_base_is_edited_trained_saved_and_loaded(quantised, tmp_path):
    _, load = quantised
    base, batch = load(), inputs()
    untouched = logits(base, batch)
    model = get_peft_model(base, RedConfig()).eval()
    assert len(edited(model)) == 1
    assert torch.equal(logits(model, batch), untouched)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    losses = train(model, batch, steps=6)
    assert losses[-1] < losses[0]
    tuned = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), untouched)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, batch), tuned)


def test_merging_quantises_anew_and_unmerging_returns_the_bits(quantised):
    kind, load = quantised
    config = RedConfig(target_modules="all-linear", init_weights=False)
    model, batch = get_peft_model(load(), config).eval(), inputs()
    tuned, targets = logits(model, batch), []
    for layer in edited(model):
        s, c = (vector["default"].weight.detach().double() for vector in (layer.repr_scaling, layer.repr_bias))
        targets.append((s[:, None] * dense(layer.base_layer), c))
    model.merge_adapter(safe_merge=True)
    for layer, (target, c) in zip(edited(model), targets, strict=True):
        bias = layer.base_layer.bias
        torch.testing.assert_close(bias.double(), c, rtol=torch.finfo(bias.dtype).eps, atol=0)
        error = (dense(layer.base_layer) - bias.double()[:, None] - target).abs().max()
        assert error <= 1.05 * STEP[kind] * target.abs().max(), error / target.abs().max()
    model.unmerge_adapter()
    assert all(layer.base_layer.bias is None for layer in edited(model))
    assert torch.equal(logits(model, batch), tuned)


def test_on_top_of_lora_it_unmerges_to_the_same_bits(quantised):
    _, load = quantised
    below = get_peft_model(load(), LoraConfig(r=4, target_modules=["down_proj"]))
    model = get_peft_model(below.get_base_model(), RedConfig(init_weights=False), adapter_name="red")
    batch = inputs()
    train(model, batch)
    (layer,) = edited(model)
    tuned, inner = logits(model, batch), layer.base_layer
    inner.merge()
    between = dense(layer.get_base_layer())
    layer.merge()
    assert layer.base_layer is inner
    assert not torch.equal(dense(layer.get_base_layer()), between)
    layer.unmerge()
    assert inner.merged
    assert torch.equal(dense(layer.get_base_layer()), between)
    inner.unmerge()
    torch.testing.assert_close(logits(model, batch), tuned, rtol=0.1, atol=0.1)
