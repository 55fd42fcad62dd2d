"""What freezes, for good, and what that stops: gradients, optimizer state, saved activations, backward."""

import copy
import re

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from small_models import batch, build
from torch import nn
from tuned import TUNERS, adamw, freezing, lowest, saved, step, tuned

from snell.training import SelectiveFreezing, cka_importance
from snell.training.adapters import outputs


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_least_important_freeze_first_and_for_good(tuner):
    model, inputs = tuned(tuner), batch("llama", 4)
    optimizer = adamw(model)
    frozen = freezing(model, optimizer, share=0.5, end=0.8, fold=False)
    importances, counts, kept = frozen.measure(), [], {}
    for i in range(1, 11):
        step(model, optimizer, inputs)
        for name in frozen.check(i):
            kept[name] = bits(frozen.adapters[name])
            for p in frozen.adapters[name].parameters():
                assert p.grad is None
                assert not p.requires_grad
                assert p not in optimizer.state
        counts.append(len(frozen.frozen))
    number = len(frozen.adapters)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == number // 2
    assert all(same(bits(frozen.adapters[name]), state) for name, state in kept.items())
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters()) > 0
    # At the first check nothing has moved far yet: who froze then had the least importance.
    first = [name for name, facts in frozen.frozen.items() if facts["step"] == 1]
    assert all(importances[name] <= sorted(importances.values())[len(first) + 2] for name in first)
    assert list(frozen.frozen) == list(kept)
    assert all(frozen.frozen[name]["importance"] == frozen.importances[name] for name in kept)


def test_an_adapter_that_changes_nothing_has_no_importance():
    for tuner, zero in (("snell", "snell_A"), ("lora", "lora_B")):
        model = tuned(tuner)
        layers = [name for name, _ in freezing(model, adamw(model)).adapters.items()]
        layer = model.get_submodule(layers[3])
        for p in getattr(layer, zero).parameters() if zero == "lora_B" else layer.parameters():
            if p.requires_grad:
                nn.init.zeros_(p)
        importances = freezing(model, adamw(model)).measure()
        assert importances.pop(layers[3]) == 0
        assert min(importances.values()) > 1e-7


@pytest.mark.parametrize("tuner", ["snell", "lora", "dora"])
def test_the_importance_is_that_of_the_output_without_the_adapter_and_with_it(tuner):
    model, inputs, found = tuned(tuner).double(), batch("llama", 4), {}
    layers = freezing(model, adamw(model)).adapters

    def keep(module, args, output):
        found[module] = args[0], output

    handles = [layer.register_forward_hook(keep) for layer in layers.values()]
    with torch.no_grad():
        model.eval()(**inputs)
    for handle in handles:
        handle.remove()
    importances = freezing(model.train(), adamw(model), batch=inputs).measure()
    for name, layer in layers.items():
        x, y = (t.flatten(0, -2) for t in found[layer])
        plain = layer.base_layer(x).detach()
        assert importances[name] == pytest.approx(cka_importance(plain, y.detach() - plain).item(), rel=1e-6)


@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_a_change_below_the_digits_of_the_output_is_seen(tuner):
    model = tuned(tuner).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1e-4 if "lora_B" in name else 0.01 if "snell_" in name else 1)
    exact = copy.deepcopy(model).double()
    for name, layer in freezing(model, adamw(model)).adapters.items():
        x = torch.randn(50, layer.base_layer.in_features).bfloat16()
        change, expected = outputs(layer, x)[1], outputs(exact.get_submodule(name), x.double())[1]
        assert expected.norm() < 2**-8 * layer.base_layer(x).norm()
        assert (change - expected).norm() < 2**-6 * expected.norm()


def test_the_importance_sees_few_rows_and_no_dropout():
    model, inputs, seen = tuned("snell", "bert"), batch("bert", 150), []  # of 7 tokens
    frozen = freezing(model, adamw(model), batch=inputs, importance=lambda output, change: seen.append(output) or 0.5)
    for seed in range(2):
        torch.manual_seed(seed)
        frozen.measure()
    half = len(seen) // 2
    assert {len(output) for output in seen} <= set(range(150, 513))
    assert max(len(output) for output in seen) == 350  # every third of 1050
    assert all(torch.equal(first, second) for first, second in zip(seen[:half], seen[half:], strict=True))


def test_gradients_at_hand_are_dropped():
    model, inputs = tuned(), batch("llama", 4)
    frozen = freezing(model, adamw(model), batch=inputs, share=0.5, end=0.1)
    model(**inputs).loss.backward()
    names = frozen.check(1)
    assert all(p.grad is None for name in names for p in frozen.adapters[name].parameters())
    assert sum(p.grad is not None for p in model.parameters()) == sum(p.requires_grad for p in model.parameters()) > 0


def test_padding_does_not_count():
    inputs = batch("bert", 4)
    model = tuned("snell", "bert")
    mask = torch.ones_like(inputs["input_ids"])
    padded = {key: value.clone() for key, value in inputs.items()} | {"attention_mask": mask.clone()}
    padded["attention_mask"][:, 5:] = 0
    other = {key: value.clone() for key, value in padded.items()}
    other["input_ids"][:, 5:] = 9
    first, second = (freezing(model, adamw(model), batch=b).measure() for b in (padded, other))
    tokens = [name for name in first if "pooler" not in name and "classifier" not in name]
    assert {name: first[name] for name in tokens} == pytest.approx({name: second[name] for name in tokens}, rel=1e-3)
    seen = freezing(model, adamw(model), batch=other | {"attention_mask": mask}).measure()
    assert any(seen[name] != pytest.approx(first[name], rel=1e-2) for name in tokens)


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"share": 0.0}, {"threshold": 1e-12}])
def test_a_run_in_which_nothing_freezes_is_the_plain_run_to_the_bit(settings):
    plain = tuned("snell", "bert")  # with dropout: checks must not move the generators
    plain.get_input_embeddings().register_forward_hook(lambda *_: torch.rand(1) and None)  # which some models do
    plain.base_model.model.bert.pooler.eval()
    safe, inputs = copy.deepcopy(plain), batch("bert", 4)
    states = []
    for model in (plain, safe):
        torch.manual_seed(3)
        optimizer = adamw(model)
        frozen = freezing(model, optimizer, batch=inputs, **settings) if model is safe else None
        for i in range(1, 5):
            step(model, optimizer, inputs)
            assert frozen is None or frozen.check(i) == []
        assert model.training
        assert not model.base_model.model.bert.pooler.training
        states.append(bits(model))
    assert same(*states)


@pytest.mark.parametrize("tuner", TUNERS)
def test_at_a_threshold_of_one_everything_freezes(tuner):
    model, inputs = tuned(tuner), batch("llama", 4)
    optimizer = adamw(model)
    frozen = freezing(model, optimizer, threshold=1.0, end=0.2)
    for i in (1, 2):
        step(model, optimizer, inputs)
        frozen.check(i)
    assert len(frozen.frozen) == len(frozen.adapters)
    assert frozen.done
    assert not optimizer.state
    before = bits(model)
    losses = []
    for i in (3, 4):
        loss = model(**inputs).loss
        assert not loss.requires_grad
        losses.append(loss.item())
        optimizer.step()
        assert frozen.check(i) == []
    assert losses[0] == losses[1]
    assert same(bits(model), before)


def test_the_warm_up_freezes_nothing_and_may_wait_for_steady_importances():
    model = tuned()
    frozen = freezing(model, adamw(model), share=1.0, warmup=0.3, end=0.6)
    assert [len(frozen.check(i)) for i in (1, 2, 3)] == [0, 0, 0]  # at 3 the rise begins
    assert frozen.warmed_up == 0.3
    assert frozen.check(4)

    values = iter([0.1, 0.2, 0.21, 0.21])
    model = tuned()
    frozen = freezing(model, adamw(model), share=1.0, tolerance=0.06)
    frozen.measure = lambda: dict.fromkeys(frozen.adapters, next(values))
    ends = []
    for i in range(1, 5):
        frozen.check(i)
        ends.append(frozen.warmed_up)
    assert ends == [None, None, 0.3, 0.3]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("tuner", ["snell", "lora"])
@pytest.mark.parametrize(
    ("names", "width"),
    [(["mlp.down_proj"], 36), (["self_attn.q_proj"], 0), ([f"self_attn.{x}_proj" for x in "qkv"], 24)],
)
def test_saved_bytes_fall_by_exactly_what_the_frozen_layers_kept(tuner, names, width, fold):
    model, inputs = tuned(tuner), batch("llama", 4)
    layers = [f"base_model.model.model.layers.1.{name}" for name in names]  # above layers that train
    before, tokens = sum(saved(model, inputs).values()), inputs["input_ids"].numel()
    frozen = freezing(model, adamw(model), fold=fold, batch=inputs)
    rank = 4
    frozen.measure = lambda: {name: float(name not in layers) for name in frozen.adapters}
    frozen.schedule = type(frozen.schedule)(threshold=0.5, warmup=0, end=0.1)
    assert frozen.check(1) == layers
    fall = before - sum(saved(model, inputs).values())
    # x of the layer, where no layer that trains keeps it too. LoRA's second product keeps A x besides.
    expected = 4 * tokens * width + (4 * tokens * rank * len(layers) if tuner == "lora" else 0)
    # A SNELL layer that is not folded keeps tau and its two scalars to rebuild dW for the gradient of x.
    expected += (4 + 8) * len(layers) if tuner == "snell" and fold else 0
    assert fall == expected


def test_set_adapter_thaws_no_adapter():
    model = tuned()
    frozen = freezing(model, adamw(model), share=0.5, end=0.1)
    names = frozen.check(1)
    model.set_adapter("default")
    assert any(p.requires_grad for p in frozen.adapters[names[0]].parameters())
    frozen.check(2)
    assert not any(p.requires_grad for name in names for p in frozen.adapters[name].parameters())


@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_a_loaded_state_freezes_the_same(tuner):
    model, inputs = tuned(tuner), batch("llama", 4)
    optimizer = adamw(model)
    frozen = freezing(model, optimizer, share=0.5, end=0.3, batch=inputs)
    twin = copy.deepcopy(model)
    for i in (1, 2):
        step(model, optimizer, inputs)
        frozen.check(i)
    assert 0 < len(frozen.frozen) < len(frozen.adapters)
    twin.load_state_dict(model.state_dict())  # of the weights as they were before folding
    again = freezing(twin, adamw(twin), share=0.5, end=0.3, batch=inputs)
    again.load_state_dict(frozen.state_dict())
    assert again.frozen == frozen.frozen
    assert again.folded == frozen.folded
    assert torch.equal(twin.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert again.check(3) == frozen.check(3)
    assert again.state_dict() == frozen.state_dict()
    with pytest.raises(ValueError, match="no adapter in model, such as nowhere"):
        again.load_state_dict(frozen.state_dict() | {"frozen": {"nowhere": {}}})


def test_what_cannot_be_served_is_refused():
    model = tuned()
    optimizer = adamw(model)
    plain = build("llama")
    prompt = get_peft_model(plain, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"model must carry a PEFT tuner's adapters.*no adapted layer \(Linear\)"):
        SelectiveFreezing(nn.Linear(2, 2), optimizer, {}, steps=1)
    with pytest.raises(ValueError, match="Prompt methods adapt no layer"):
        SelectiveFreezing(prompt, optimizer, {}, steps=1)
    with pytest.raises(ValueError, match="none of its 14 adapted layers is trained"):
        SelectiveFreezing(tuned().requires_grad_(False), optimizer, {}, steps=1)
    with pytest.raises(ValueError, match="steps must be an int of at least 1; got 0"):
        SelectiveFreezing(model, optimizer, {}, steps=0)
    with pytest.raises(TypeError, match="importance must be a function"):
        SelectiveFreezing(model, optimizer, {}, steps=1, importance="cka")
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer; got Llama"):
        SelectiveFreezing(model, plain, {}, steps=1)
    with pytest.raises(ValueError, match=re.escape("threshold must be a number in [0, 1]; got 2")):
        SelectiveFreezing(model, optimizer, {}, steps=1, threshold=2)
    nan = freezing(model, optimizer, importance=lambda output, change: float("nan"))
    with pytest.raises(ValueError, match=r"the importance of .*q_proj is nan"):
        nan.check(1)


def test_the_importance_may_be_any_function():
    model = tuned()
    frozen = freezing(model, adamw(model), share=0.25, end=0.1, importance=lowest(3))
    assert frozen.check(1) == list(frozen.adapters)[:3]


@pytest.mark.parametrize("tuner", ["snell", "lora"])
def test_a_compiled_model_freezes_as_an_eager_one(tuner):
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    config = TUNERS[tuner]()
    config.target_modules = {"0", "2", "4"}
    model = get_peft_model(layers, config)
    runs, x = [], torch.randn(30, 12)
    for module in (model, torch.compile(copy.deepcopy(model), backend="aot_eager")):
        optimizer, losses = adamw(module), []
        frozen = freezing(module, optimizer, batch=(x,), share=0.7, initial=0.4, end=0.2)
        for i in (1, 2, 3):
            loss = module(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            frozen.check(i)
        runs.append((losses, frozen.frozen.keys()))
    assert len(runs[0][1]) == 2
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert runs[0][1] == runs[1][1]
