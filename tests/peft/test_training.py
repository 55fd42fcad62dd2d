"""Training as people do it: Trainer, Accelerate, checkpointing, compilation; resumed runs equal unbroken ones."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from small_models import adapted, batch, build, config, logits, train
from trainer_runs import Samples, StopAfter, losses, run

from snell.competition import memo
from snell.peft import AdaptedLinear, RedConfig, XpeftConfig

CHECKPOINTING = [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for reentrant in (True, False)
]


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        key: value.clone()
        for key, value in model.state_dict().items()
        if any(tuner in key for tuner in ("snell_", "repr_", "xpeft_"))
    }


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(
    ("name", "settings", "make"),
    [
        ("bert", {"gradient_accumulation_steps": 2}, config),  # with dropout: the generators' states come back too
        ("llama", {"bf16": True}, config),
        ("gpt2", CHECKPOINTING[0], config),
        ("t5", CHECKPOINTING[1], config),
        ("vit", {}, config),
        ("bert", {"gradient_accumulation_steps": 2}, RedConfig),
        ("llama", {"bf16": True}, RedConfig),
        ("t5", CHECKPOINTING[1], RedConfig),
        ("bert", {}, XpeftConfig),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else getattr(value, "__name__", value),
)
def test_a_resumed_trainer_run_equals_the_one_that_was_not_interrupted(name, settings, make, tmp_path):
    base, data = build(name), Samples(name, 10)
    whole = get_peft_model(copy.deepcopy(base), make())
    broken, resumed = copy.deepcopy(whole), get_peft_model(copy.deepcopy(base), make())
    unbroken = run(whole, data, tmp_path / "whole", **settings)
    unbroken.train()

    settings = {**settings, "save_strategy": "steps", "save_steps": 2}
    run(broken, data, tmp_path / "broken", StopAfter(2), **settings).train()
    assert (tmp_path / "broken" / "checkpoint-2" / "adapter_model.safetensors").exists()
    second = run(resumed, data, tmp_path / "broken", **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))

    assert second.state.global_step == 4
    assert losses(second) == losses(unbroken)
    assert factors(whole)
    assert_equal(factors(resumed), factors(whole))
    assert second.evaluate()["eval_loss"] == unbroken.evaluate()["eval_loss"]


def test_two_runs_of_the_same_seed_give_the_same_bits(tmp_path):
    data = Samples("bert", 6)
    first, _ = adapted("bert", dropout=0.2)
    second = copy.deepcopy(first)
    for model in (first, second):
        run(model, data, tmp_path).train()
    assert_equal(factors(first), factors(second))


# Reentrant checkpointing needs inputs with gradients: transformers gives token embeddings those, not images.
@pytest.mark.parametrize(
    ("name", "settings"), [("llama", CHECKPOINTING[0]), ("llama", CHECKPOINTING[1]), ("vit", CHECKPOINTING[1])]
)
def test_gradient_checkpointing_changes_no_bit(name, settings, tmp_path):
    data = Samples(name, 6)
    plain, _ = adapted(name)
    checkpointed = copy.deepcopy(plain)
    run(plain, data, tmp_path).train()
    run(checkpointed, data, tmp_path, **settings).train()
    assert_equal(factors(checkpointed), factors(plain))


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    model, _ = adapted("vit")
    inputs = batch("vit", 4)
    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        for part in range(parts):
            size = 4 // parts
            (model(**{k: v[part * size : (part + 1) * size] for k, v in inputs.items()}).loss / parts).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    for key, whole in gradients[0].items():
        assert (gradients[1][key] - whole).abs().max() <= 1e-4 * whole.abs().max() + 1e-9, key


def test_a_threshold_is_selected_once_per_parameter_version(monkeypatch):
    model, _ = adapted("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = sum(isinstance(module, AdaptedLinear) for module in model.modules())
    inputs, selections, remember = batch("llama"), [], memo.remember

    def counting(key, compute):
        return remember(key, lambda: (selections.append(1), compute())[1])

    monkeypatch.setattr(memo, "remember", counting)
    model.train()
    for _ in range(3):  # accumulation, each forward run twice by checkpointing
        model(**inputs).loss.backward()
    logits(model.eval(), inputs)
    assert len(selections) == layers
    train(model, inputs, steps=1)
    logits(model, inputs)
    assert len(selections) == 2 * layers


def test_bf16_training_keeps_factors_and_their_gradients_in_float32(tmp_path):
    model, _ = adapted("llama")
    trainer = run(model, Samples("llama", 6), tmp_path, bf16=True)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer))
    assert {value.dtype for value in factors(model).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch("llama")).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_the_trainer_evaluates_and_predicts(tmp_path):
    model, _ = adapted("bert")
    trainer = run(model, Samples("bert", 6), tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (6, 3)


def test_an_accelerate_loop_equals_the_plain_one():
    plain, _ = adapted("llama")
    accelerated = copy.deepcopy(plain)
    inputs = batch("llama")
    train(plain, inputs)

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in accelerated.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader([inputs] * 3, batch_size=None)
    model, optimizer, loader = accelerator.prepare(accelerated, optimizer, loader)
    model.train()
    for step in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**step).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(factors(accelerator.unwrap_model(model)), factors(plain))


def test_the_model_compiles_in_one_graph():
    torch._dynamo.reset()
    model, _ = adapted("llama", target_modules=["q_proj", "down_proj"])
    model.base_model.model.model.layers = model.base_model.model.model.layers[:1]
    inputs = batch("llama")
    eager = model(**inputs).loss
    eager.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    loss = compiled(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-6)
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"kernel": "sigmoid"}], ids=["dropout", "sigmoid"])
def test_a_layer_compiles_in_one_graph(settings):
    torch._dynamo.reset()
    model, _ = adapted("llama", **settings)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.train()
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(3, 24)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    assert layer.snell_A["default"].weight.grad.any()
