"""LoRA's features that PEFT gives to SNELL's models: rows of an embedding, and models made of copies of blocks."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import adapted, batch, build, config, logits, train


def test_rows_of_the_embedding_train_beside_the_adapter(tmp_path):
    torch.manual_seed(0)
    model, untouched = adapted("llama", trainable_token_indices=[5, 9], init_weights="identity")
    inputs = batch("llama")
    inputs["input_ids"][:, :2] = torch.tensor([5, 9])
    assert logits(model, inputs).equal(logits(untouched, inputs))
    train(model, inputs)
    tokens = torch.arange(model.config.vocab_size)
    before = untouched.get_input_embeddings().weight
    moved = (model.get_input_embeddings()(tokens) != before).any(1).nonzero().flatten()
    assert moved.tolist() == [5, 9]
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path).eval()
    assert logits(loaded, inputs).equal(expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected)
    assert (merged.get_input_embeddings().weight != before).any(1).nonzero().flatten().tolist() == [5, 9]


def test_an_embedding_is_named_or_is_saved_whole_but_not_both():
    by_name, _ = adapted("gpt2", trainable_token_indices={"wte": [3]})
    assert any("trainable_tokens" in name for name, p in by_name.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="already marked to be trained fully"):
        adapted("llama", trainable_token_indices={"embed_tokens": [5]}, modules_to_save=["embed_tokens"])


def test_copies_of_blocks_share_weights_and_have_adapters_of_their_own(tmp_path):
    torch.manual_seed(0)
    settings = {"layer_replication": [(0, 2), (0, 2)], "target_modules": ["q_proj", "down_proj"]}
    model, untouched = adapted("llama", **settings)
    layers, inputs = model.get_base_model().model.layers, batch("llama")
    first, copied = layers[0].self_attn.q_proj, layers[2].self_attn.q_proj
    assert len(layers) == 4
    assert first.base_layer.weight is copied.base_layer.weight
    assert not first.snell_A["default"].weight.equal(copied.snell_A["default"].weight)
    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match="layer_replication"):
        model.merge_and_unload()
    assert logits(model, inputs).equal(expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path).eval()
    assert logits(loaded, inputs).equal(expected)


def test_blocks_that_cannot_be_found_are_an_error_of_pefts():
    with pytest.raises(ValueError, match="Could not locate the layers"):
        get_peft_model(build("t5"), config(layer_replication=[(0, 2)]))
