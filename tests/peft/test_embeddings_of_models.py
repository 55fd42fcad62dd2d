"""transformers' own models with adapted embeddings and convolutions, through all that PEFT does with an adapter."""

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import TOKENS, VOCABULARY, batch, build, config, logits, train
from test_export import loader

from snell.peft import export_sparse
from snell.peft.snell.convolution import AdaptedConvolution
from snell.peft.snell.embedding import AdaptedEmbedding

#: Modules to adapt in each model, and the class that the first becomes.
TARGETS = {
    "bert": (["word_embeddings", "position_embeddings", "query"], AdaptedEmbedding),
    "vit": (["projection", "query"], AdaptedConvolution),
    "gpt2": (["wte", "c_attn"], AdaptedEmbedding),
}
MODELS = pytest.mark.parametrize("name", TARGETS)


def gemma() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 36, "head_dim": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(vocab_size=VOCABULARY, **sizes, **heads, **TOKENS)).eval()


def adapted(base, name, **settings):
    return get_peft_model(base, config(target_modules=TARGETS[name][0], **settings)).eval()


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_identity_gives_the_bases_outputs_and_trains(name, dtype):
    base = build(name).to(dtype)
    inputs = {key: t.to(dtype) if t.is_floating_point() else t for key, t in batch(name).items()}
    before = logits(base, inputs)
    model = adapted(base, name, init_weights="identity", scale=None, sparsity=0.7)
    assert any(type(module) is TARGETS[name][1] for module in model.modules())
    assert torch.equal(logits(model, inputs), before)
    model(**inputs).loss.backward()
    assert all(p.grad.any() for key, p in model.named_parameters() if "snell_" in key)
    train(model, inputs)
    assert not torch.equal(logits(model, inputs), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)


@MODELS
def test_an_adapter_is_saved_loaded_merged_and_exported(name, tmp_path):
    base = build(name)
    untouched, inputs = copy.deepcopy(base), batch(name)
    model = adapted(base, name)
    train(model, inputs)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "adapter")
    assert torch.equal(logits(loaded, inputs), expected)

    state = {key: value.clone() for key, value in model.state_dict().items()}
    export_sparse(model, tmp_path / "sparse")
    model.merge_adapter(safe_merge=True)
    merged = logits(model, inputs)
    # A tied output head reads the merged weight: so it does with LoRA.
    assert torch.allclose(merged, expected, rtol=1e-4, atol=1e-5) == (name != "gpt2")
    model.unmerge_adapter()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert torch.equal(logits(model.merge_and_unload(), inputs), merged)
    loader()(untouched, tmp_path / "sparse")
    assert torch.equal(logits(untouched, inputs), merged)


@pytest.mark.parametrize("tuner", ["lora", "snell"])
def test_a_tied_head_shares_the_merged_weight_as_with_lora(tuner):
    settings = config(target_modules=["wte"]) if tuner == "snell" else LoraConfig(target_modules=["wte"])
    base = build("gpt2")
    model = get_peft_model(base, settings)
    model.merge_adapter()
    weight = base.transformer.wte.base_layer.weight
    assert base.lm_head.weight.data_ptr() == weight.data_ptr()


def test_the_scaled_embedding_of_gemma_merges():
    model = get_peft_model(gemma(), config(target_modules=["embed_tokens"])).eval()
    base, inputs = model.get_base_model(), batch("gpt2")
    hidden = base.model(inputs["input_ids"]).last_hidden_state
    with model.disable_adapter():
        assert not torch.allclose(base.model(inputs["input_ids"]).last_hidden_state, hidden)
    model.merge_adapter()
    torch.testing.assert_close(base.model(inputs["input_ids"]).last_hidden_state, hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_broken_adapter_is_not_merged(name):
    model = adapted(build(name), name)
    layer = next(module for module in model.modules() if type(module) is TARGETS[name][1])
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.snell_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
