"""The solver of budgets: never above, within one unit, and PEFT counts the same."""

import pytest

pytest.importorskip("peft")
pytest.importorskip("click")

import peft
import transformers as tf

from snell.study.budget import solve
from snell.study.methods import adapt, parse

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MARIAN = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
MARIAN |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0, "vocab_size": 100}
MODELS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(vocab_size=100, **SMALL)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=100, num_key_value_heads=2, **SMALL)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**MARIAN)),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(image_size=32, patch_size=8, **SMALL)),
}
TASKS = {"bert": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TASKS["marian"] = "SEQ_2_SEQ_LM"


def cost(model, name, method, rank):
    weight = model.get_submodule(name).weight
    return rank * sum(weight.shape)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("method", ["lora", "dora", "snell", "shira"])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_are_never_above_within_one_unit_and_counted_as_peft_counts(name, method, share):
    if (name, method) == ("gpt2", "shira"):
        pytest.skip("PEFT's SHiRA takes no Conv1D")
    model = MODELS[name]()
    total = sum(p.numel() for p in model.parameters())
    budget = solve(model, method, share)
    assert (budget.total, budget.allowed) == (total, int(share * total))
    assert 0 < budget.trained <= share * total
    unit = 2 if method == "snell" else 1
    every = solve(model, method, 1).layers
    if set(budget.layers) == set(every):
        one_more = sum(cost(model, layer, method, unit) for layer in every)
    else:
        assert budget.size == unit
        magnitude = {layer: model.get_submodule(layer).weight.shape[0] if method == "dora" else 0 for layer in every}
        if name == "gpt2":
            magnitude = {layer: model.get_submodule(layer).nf if method == "dora" else 0 for layer in every}
        others = set(every) - set(budget.layers)
        one_more = min(cost(model, layer, method, unit) + magnitude[layer] for layer in others)
    whole = [model.get_submodule(layer).weight for layer in every]
    most = min(weight.numel() // sum(weight.shape) for weight in whole)
    assert budget.trained + one_more > budget.allowed or (method == "shira" and budget.size == most)
    adapted = adapt(model, parse(method), budget.size, 0, None, budget.layers)
    assert adapted.get_nb_trainable_parameters()[0] == budget.trained


@pytest.mark.parametrize("name", TASKS)
def test_a_prefix_is_counted_as_peft_counts(name):
    model = MODELS[name]()
    budget = solve(model, "prefix", 0.05)
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=budget.size))
    assert adapted.get_nb_trainable_parameters()[0] == budget.trained <= budget.allowed
    assert budget.trained + budget.trained // budget.size > budget.allowed


def test_shira_has_a_sparsity_and_full_fine_tuning_trains_all():
    model = MODELS["bert"]()
    budget = solve(model, "shira", 0.05)
    weights = sum(model.get_submodule(name).weight.numel() for name in budget.layers)
    assert budget.trained == round((1 - budget.sparsity) * weights)
    full = solve(model, "full", 0.05)
    assert full.trained == full.total == sum(p.numel() for p in model.parameters())


def test_layers_at_a_small_budget_are_spread_over_the_model():
    model = tf.BertModel(tf.BertConfig(vocab_size=100, **SMALL | {"num_hidden_layers": 12}))
    budget = solve(model, "lora", 0.004)
    blocks = [int(name.split(".")[2]) for name in budget.layers]
    assert 4 <= len(blocks) <= 12
    assert min(blocks) <= 2
    assert max(blocks) >= 9


@pytest.mark.parametrize(
    ("method", "share", "says"),
    [
        ("lora", 0, "over 0"),
        ("lora", 1e-6, "the least that lora"),
        ("lorra", 0.1, "'lorra'"),
        ("prefix", 1e-4, "least"),
    ],
)
def test_what_cannot_be_solved_is_named(method, share, says):
    with pytest.raises(ValueError, match=says):
        solve(MODELS["bert"](), method, share)
