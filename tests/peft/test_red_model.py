"""A RED model behaves as one of a tuner that ships with PEFT does; its counts are the paper's."""

import copy
import json

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftConfig, PeftModel, get_model_status, get_peft_model
from small_models import BUILDERS, batch, build, logits, train
from torch import nn

from snell.peft import EditedLinear, RedConfig, RedModel, SnellConfig, save_adapter

MODELS = pytest.mark.parametrize("name", list(BUILDERS))


def adapted(name: str, **settings) -> tuple[PeftModel, tf.PreTrainedModel]:
    """A model with edits that show, in evaluation mode, and an untouched copy of its base."""
    base = build(name)
    untouched = copy.deepcopy(base)
    return get_peft_model(base, RedConfig(**{"init_weights": False, **settings})).eval(), untouched


def edited(model: nn.Module) -> dict[str, EditedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, EditedLinear)}


# --- targets and counts

ROBERTA_L = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "num_attention_heads": 16}
GPT2_M = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
GPT2_L = {"n_embd": 1280, "n_layer": 36, "n_head": 20}
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32}

#: RED++ edits the outputs of the attention's projections too.
MORE_BERT = {"target_modules": ["output.dense", "query", "key", "value"]}
MORE_GPT2 = {"target_modules": ["c_attn", "c_proj"]}


@pytest.mark.parametrize(
    "make, config, settings, numbers",
    [
        (tf.RobertaModel, tf.RobertaConfig(), {}, 18_432),
        (tf.RobertaModel, tf.RobertaConfig(**ROBERTA_L), {}, 49_152),
        (tf.GPT2Model, tf.GPT2Config(**GPT2_M), {}, 49_152),
        (tf.GPT2Model, tf.GPT2Config(**GPT2_L), {}, 92_160),
        (tf.T5Model, tf.T5Config(**T5_BASE), {}, 36_864),
        (tf.LlamaModel, tf.LlamaConfig(**LLAMA_7B), {}, 262_144),
        (tf.ViTModel, tf.ViTConfig(), {}, 18_432),
        (tf.BertModel, tf.BertConfig(), {}, 18_432),
        (tf.RobertaModel, tf.RobertaConfig(), MORE_BERT, 92_160),
        (tf.RobertaModel, tf.RobertaConfig(**ROBERTA_L), MORE_BERT, 245_760),
        (tf.GPT2Model, tf.GPT2Config(**GPT2_M), MORE_GPT2, 245_760),
        (tf.GPT2Model, tf.GPT2Config(**GPT2_L), MORE_GPT2, 460_800),
    ],
)
def test_trained_numbers_are_the_papers(make, config, settings, numbers):
    with torch.device("meta"):
        model = get_peft_model(make(config), RedConfig(**settings))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers


@pytest.mark.parametrize(
    "name, suffix, layers",
    [
        ("bert", "output.dense", 2),
        ("gpt2", "mlp.c_proj", 2),
        ("llama", "mlp.down_proj", 2),
        ("t5", "DenseReluDense.wo", 4),
        ("vit", "mlp.fc2", 2),
    ],
)
def test_the_second_layer_of_each_feed_forward_block_is_the_default(name, suffix, layers):
    names = list(edited(adapted(name)[0]))
    assert len(names) == layers
    assert all(one.endswith(suffix) and "attention" not in one for one in names)


@pytest.mark.parametrize("excluded", [None, ["0.output.dense"], r".*\.0\.output\.dense"])
def test_attentions_output_stays_out_beside_what_the_user_excludes(excluded):
    names = list(edited(adapted("bert", exclude_modules=excluded)[0]))
    assert [name.split("layer.")[1] for name in names] == [
        f"{i}.output.dense" for i in range(2) if i or excluded is None
    ]


def test_blocks_are_chosen_by_their_index():
    model, _ = adapted("bert", layers_to_transform=[1])
    assert [name.split("layer.")[1] for name in edited(model)] == ["1.output.dense"]


def test_an_architecture_that_is_not_known_needs_targets():
    class Unknown(nn.Module):
        config = tf.BertConfig()

    Unknown.config.model_type = "nothing"
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(Unknown(), RedConfig())


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(5, 8), nn.Conv2d(1, 2, 3)
        self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)


@pytest.mark.parametrize(
    "target, error, reason",
    [
        ("embedding", TypeError, r"embedding cannot be adapted: it is a Embedding; RED adapts torch\.nn\.Linear"),
        ("conv", TypeError, "conv cannot be adapted: it is a Conv2d"),
        ("attention", TypeError, "MultiheadAttention"),
        ("attention.out_proj", ValueError, "never calls"),
        ("missing", ValueError, "missing"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_the_reason(target, error, reason):
    with pytest.raises(error, match=reason):
        get_peft_model(Embedded(), RedConfig(target_modules=[target]))


def test_another_tuners_embedding_is_refused_too():
    below = get_peft_model(Embedded(), LoraConfig(target_modules=["embedding"]))
    with pytest.raises(TypeError, match="it is a Embedding; RED adapts"):
        get_peft_model(below.get_base_model(), RedConfig(target_modules=["embedding"]), adapter_name="other")


def test_a_name_that_another_tuners_adapter_has_is_refused():
    below = get_peft_model(build("llama"), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="adapter_name must not be 'default'"):
        get_peft_model(below.get_base_model(), RedConfig())


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"init_weights": "lora"}, "init_weights must be"),
        ({"target_modules": "q", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "h"}, "layers_pattern"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        RedConfig(**settings)


# --- the life of an adapter


@MODELS
def test_a_fresh_adapter_gives_the_bases_bits(name):
    model, untouched = adapted(name, init_weights=True)
    inputs = batch(name)
    assert torch.equal(logits(model, inputs).view(torch.int32), logits(untouched, inputs).view(torch.int32))


@MODELS
def test_disabled_unmerged_deleted_and_unloaded_edits_give_the_base_models_outputs_exactly(name):
    model, untouched = adapted(name)
    inputs = batch(name)
    base, tuned = logits(untouched, inputs), logits(model, inputs)
    assert not torch.equal(base, tuned)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), tuned)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), tuned, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), tuned)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model, inputs), base)
    assert torch.equal(logits(model.unload(), inputs), base)


@MODELS
def test_training_moves_the_vectors_alone_and_merging_keeps_what_they_do(name):
    model, untouched = adapted(name, init_weights=True)
    before, inputs = {key: value.clone() for key, value in model.state_dict().items()}, batch(name)
    loss = model(**inputs).loss.item()
    train(model, inputs, steps=10)
    assert model(**inputs).loss.item() < loss
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("repr_" not in key), key
    tuned = logits(model, inputs)
    merged = model.merge_and_unload(safe_merge=True)
    assert [type(m) for m in merged.modules()] == [type(m) for m in untouched.modules()]
    torch.testing.assert_close(logits(merged, inputs), tuned, rtol=1e-5, atol=1e-5)


def test_a_merged_model_without_biases_has_some_and_loads_into_one_that_has_them(tmp_path):
    model, untouched = adapted("llama")
    inputs = batch("llama")
    tuned, merged = logits(model, inputs), model.merge_and_unload()
    added = {key for key in merged.state_dict() if key not in untouched.state_dict()}
    assert added == {f"model.layers.{i}.mlp.down_proj.bias" for i in range(2)}
    merged.save_pretrained(tmp_path)
    config = tf.LlamaConfig.from_pretrained(tmp_path, mlp_bias=True)
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path, config=config).eval()
    torch.testing.assert_close(logits(loaded, inputs), tuned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_adapter])
@MODELS
def test_a_saved_adapter_loads_with_its_bits(name, save, tmp_path):
    model, untouched = adapted(name)
    inputs = batch(name)
    train(model, inputs)
    save(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "RED"
    assert PeftConfig.from_pretrained(tmp_path).target_modules == model.peft_config["default"].target_modules
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(untouched), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert isinstance(loaded.base_model, RedModel)
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert "import snell.peft" in (tmp_path / "README.md").read_text()


def test_adapters_are_added_switched_stacked_and_deleted():
    model, _ = adapted("bert")
    inputs = batch("bert")
    first = logits(model, inputs)
    model.add_adapter("red", RedConfig(init_weights=False))
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("red")
    second = logits(model, inputs)
    assert not torch.equal(second, first)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(key.endswith(".red.weight") for key in trainable)
    model.base_model.set_adapter(["default", "red"])
    both = logits(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), both)
    model.set_adapter("default")
    model.delete_adapter("red")
    assert torch.equal(logits(model, inputs), first)
    status = get_model_status(model)
    assert (status.peft_types, status.trainable_params) == ({"default": "RED"}, 2 * 2 * 24)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_batch_mixes_adapters(name):
    model, untouched = adapted(name)
    model.add_adapter("other", RedConfig(init_weights=False))
    model.eval()
    inputs, names = batch(name, 3), ["other", "__base__", "default"]
    mixed = logits(model, inputs, adapter_names=names)
    for i, adapter in enumerate(names):
        if adapter == "__base__":
            alone = logits(untouched, inputs)
        else:
            model.set_adapter(adapter)
            alone = logits(model, inputs)
        torch.testing.assert_close(mixed[i], alone[i], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"^Trying to infer with non-existing adapter\(s\): nobody$"):
        logits(model, inputs, adapter_names=["nobody"] * 3)


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model, untouched = adapted("bert", modules_to_save=["classifier"], task_type="SEQ_CLS")
    inputs = batch("bert")
    train(model, inputs)
    assert not torch.equal(model.base_model.model.classifier.weight, untouched.classifier.weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


# --- precision


@pytest.mark.parametrize("autocast", [True, False])
def test_the_scalings_of_a_bfloat16_model_move_at_a_small_learning_rate(autocast):
    """Held in bfloat16, every step of 2e-5 from 1 is rounded away: the published Llama's scalings are exactly 1."""
    model = get_peft_model(build("llama").bfloat16(), RedConfig(), autocast_adapter_dtype=autocast)
    vectors = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in vectors} == {torch.float32}
    inputs, optimizer = batch("llama"), torch.optim.AdamW(vectors, lr=2e-5, weight_decay=0)
    for _ in range(3):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in edited(model).values():
        moved = (layer.repr_scaling["default"].weight - 1).abs()
        assert (moved > 1e-5).float().mean() > 0.9
    model.to(torch.float16)
    assert {p.dtype for p in vectors} == {torch.float32}


def test_activation_checkpointing_gives_the_same_gradients():
    inputs, grads = batch("llama"), []
    model, _ = adapted("llama")
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# --- on top of other tuners


@pytest.mark.parametrize("kind", [LoraConfig, SnellConfig])
def test_on_top_of_another_tuner_both_are_saved_and_loaded(kind, tmp_path):
    base, inputs = build("llama"), batch("llama")
    untouched = copy.deepcopy(base)
    below = get_peft_model(base, kind(r=4, target_modules="all-linear"))
    model = get_peft_model(below.get_base_model(), RedConfig(init_weights=False), adapter_name="red")
    train(model, inputs)
    tuned = logits(model, inputs)
    save_adapter(model, tmp_path)
    # One after the other, as they were attached.
    below = PeftModel.from_pretrained(untouched, tmp_path)
    again = PeftModel.from_pretrained(below.get_base_model(), tmp_path / "red", adapter_name="red").eval()
    assert torch.equal(logits(again, inputs), tuned)


@pytest.mark.parametrize("kind", [LoraConfig, SnellConfig])
def test_on_top_of_another_tuner_both_train_and_merge(kind):
    base, inputs = build("llama"), batch("llama")
    below = get_peft_model(base, kind(r=4, target_modules="all-linear"))
    model = get_peft_model(below.get_base_model(), RedConfig(), adapter_name="red")
    before = logits(below.eval(), inputs)
    losses = train(model, inputs, steps=8)
    assert losses[-1] < losses[0]
    moved = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key.split(".")[-3].split("_")[0] for key in moved} == {"repr", "lora" if kind is LoraConfig else "snell"}
    tuned = logits(model, inputs)
    assert not torch.allclose(tuned, before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), tuned, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, inputs), tuned, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if hasattr(m, "base_layer")]
    torch.testing.assert_close(logits(merged, inputs), tuned, rtol=1e-4, atol=1e-4)
