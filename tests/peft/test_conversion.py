"""PEFT converts an update to LoRA by a truncated SVD; the error is stated, and is the one that the SVD must leave."""

import pytest
import torch
from peft import PeftModel, convert_to_lora, save_as_lora
from small_models import adapted, batch, logits, train

from snell.peft import lora_error


@pytest.mark.parametrize("start", [False, "identity"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_error_is_that_of_the_singular_values_left_out(name, start):
    model, _ = adapted(name, init_weights=start)
    train(model, batch(name))
    error = lora_error(model, convert_to_lora(model, rank=3)[1])
    lost = size = 0.0
    for key, layer in model.base_model._layers("default"):
        values = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double()).square()
        assert error.layers[key] == pytest.approx((values[3:].sum() / values.sum()).sqrt().item(), rel=1e-4, abs=1e-6)
        lost, size = lost + values[3:].sum().item(), size + values.sum().item()
    assert error.whole == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert error.whole > 0.1


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_at_full_rank_the_lora_adapter_is_the_update(name, tmp_path):
    model, base = adapted(name)
    save_as_lora(tmp_path, model, rank=1.0)
    _, state = convert_to_lora(model, rank=1.0)
    assert lora_error(model, state).whole < 1e-3
    inputs = batch(name)
    converted = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(converted, inputs), logits(model, inputs), rtol=1e-3, atol=1e-4)


def test_a_layer_left_out_is_lost_whole():
    model, _ = adapted("llama")
    error = lora_error(model, {})
    assert error.whole == 1
    assert set(error.layers.values()) == {1.0}
    with pytest.raises(ValueError, match="got 'nobody'"):
        lora_error(model, {}, "nobody")
