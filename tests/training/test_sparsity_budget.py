"""Layers compete for the entries that they keep: published averages, exact totals, and what is saved."""

import copy
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model

sys.path.append(str(Path(__file__).parents[1] / "peft"))
from small_models import batch, build, logits
from trainer_runs import Samples, losses, run

from snell.cli import main
from snell.peft import AdaptedLinear, SnellConfig
from snell.training import BudgetCallback, BudgetSchedule, SparsityBudget

SCHEDULE = BudgetSchedule(0.5, 0.9, total=10)


def adapted(**settings):
    return get_peft_model(build("bert"), SnellConfig(**{"r": 4, "target_modules": ["query", "dense"], **settings}))


def layers(model):
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def kept(model):
    """Survivors, counted from what each layer adds."""
    return [int(layer.get_delta_weight("default").count_nonzero()) for layer in layers(model)]


def give_gradients(model, size=1.0):
    for p in model.parameters():
        if p.requires_grad:
            p.grad = size * torch.randn_like(p)


def test_the_average_and_its_spread_are_the_published_recursion():
    model = adapted()
    budget = SparsityBudget(model, SCHEDULE, beta1=0.8, beta2=0.7)
    factors = [p for layer in layers(model) for p in (layer.snell_A["default"].weight, layer.snell_B["default"].weight)]
    E, U = ([np.zeros(p.shape) for p in factors] for _ in range(2))
    for step in range(1, 6):
        give_gradients(model)
        factors[0].grad[0, 0], factors[1].grad[1, 1], factors[2].grad[2, 2] = float("nan"), float("inf"), -float("inf")
        budget.update_and_allocate(step)
        for i, p in enumerate(factors):
            now = np.nan_to_num(np.abs(p.detach().numpy() * p.grad.numpy()), nan=0, posinf=0, neginf=0)
            E[i] = 0.8 * E[i] + 0.2 * now
            U[i] = 0.7 * U[i] + 0.3 * np.abs(now - E[i])
    expected = [np.mean(E[i] * U[i]) + np.mean(E[i + 1] * U[i + 1]) for i in range(0, len(E), 2)]
    assert budget.scores() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("importance", ["sensitivity", "magnitude", lambda layer, adapter: float(layer.in_features)])
def test_the_layers_keep_exactly_the_total(importance):
    model = adapted()
    budget = SparsityBudget(model, SCHEDULE, importance=importance)
    assert sum(kept(model)) == SCHEDULE.kept(0, budget.entries)
    for step in range(1, 11):
        give_gradients(model)
        assert budget.update_and_allocate(step)
        assert sum(kept(model)) == SCHEDULE.kept(step, budget.entries)
    assert len({spec.sparsity for layer in layers(model) for spec in layer.snell_spec.values()}) > 1
    assert [step for step, _ in budget.history] == list(range(11))


def test_a_layer_with_larger_gradients_keeps_more():
    model = adapted()
    budget = SparsityBudget(model, SCHEDULE)
    alike = [layer for layer in layers(model) if (layer.in_features, layer.out_features) == (24, 24)]
    first, second = alike[:2]
    for step in range(1, 4):
        give_gradients(model)
        for p in first.parameters():
            if p.requires_grad:
                p.grad *= 3
        budget.update_and_allocate(step)
    assert first.snell_spec["default"].sparsity < second.snell_spec["default"].sparsity


def test_no_gradients_or_none_of_a_layer_are_no_error():
    model = adapted()
    budget = SparsityBudget(model, SCHEDULE)
    assert budget.update_and_allocate(1)  # all scores 0: by size
    assert len({round(spec.sparsity, 2) for layer in layers(model) for spec in layer.snell_spec.values()}) == 1
    give_gradients(model)
    quiet = layers(model)[0]
    for p in quiet.parameters():
        p.grad = None
    budget.update_and_allocate(2)
    assert kept(model)[0] == 0
    assert sum(kept(model)) == SCHEDULE.kept(2, budget.entries)


def test_frozen_layers_keep_their_sparsity():
    model = adapted()
    frozen = layers(model)[0].requires_grad_(False)
    budget = SparsityBudget(model, SCHEDULE)
    give_gradients(model)
    budget.update_and_allocate(1)
    assert frozen.snell_spec["default"].sparsity == 0.9
    with pytest.raises(ValueError, match="SNELL adapter 'default' that is trained"):
        SparsityBudget(model.requires_grad_(False), SCHEDULE)


def test_full_layers_keep_all_entries_but_one():
    model = adapted()
    SparsityBudget(model, BudgetSchedule(0.0, 0.9, total=3))
    for layer, count in zip(layers(model), kept(model), strict=True):
        assert count == layer.in_features * layer.out_features - 1


@pytest.mark.parametrize("start", [True, "identity"])
def test_an_adapter_is_loaded_with_its_own_sparsities(start, tmp_path):
    base = build("bert")
    config = SnellConfig(r=4, target_modules=["query", "dense"], init_weights=start)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path / "before")
    assert not any("sparsity" in key for key in model.state_dict())
    budget = SparsityBudget(model, SCHEDULE)
    give_gradients(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p -= 0.02 * p.grad
    budget.update_and_allocate(1)
    model.save_pretrained(tmp_path / "after")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "after").eval()
    data = batch("bert", 2)
    assert logits(loaded, data).equal(logits(model, data))
    specs = [[layer.snell_spec["default"] for layer in layers(one)] for one in (model, loaded)]
    assert specs[0] == specs[1]
    merged = copy.deepcopy(loaded).merge_and_unload()
    torch.testing.assert_close(logits(merged, data), logits(model, data), rtol=1e-4, atol=1e-5)


def test_a_changed_sparsity_is_a_new_threshold():
    model = adapted()
    layer = layers(model)[0]
    before = kept(model)[0]
    layer.set_sparsity("default", 0.5)
    assert kept(model)[0] == layer.in_features * layer.out_features // 2
    layer.set_sparsity("default", 0.9)
    assert kept(model)[0] == before
    with pytest.raises(ValueError, match="sparsity must stay above 0"):
        layer.set_sparsity("default", 0.0)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        layer.set_sparsity("default", 1.0)


def test_a_state_goes_on_as_the_training_that_it_is_of():
    torch.manual_seed(0)
    model = adapted()
    budget = SparsityBudget(model, SCHEDULE)
    give_gradients(model)
    budget.update_and_allocate(1)
    twin = copy.deepcopy(model)
    second = SparsityBudget(twin, SCHEDULE)
    second.load_state_dict(copy.deepcopy(budget.state_dict()))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        if one.requires_grad:
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
    budget.update_and_allocate(2)
    second.update_and_allocate(2)
    assert budget.history == second.history
    assert kept(model) == kept(twin)
    with pytest.raises(ValueError, match="state must be of the same layers"):
        SparsityBudget(adapted(target_modules=["query"]), SCHEDULE).load_state_dict(budget.state_dict())


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_a_resumed_trainer_run_equals_the_one_that_was_not_interrupted(every, tmp_path):
    base, data = build("bert"), Samples("bert", 12)
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    config = SnellConfig(r=4, target_modules=["query", "dense"])

    def trainer(folder):
        torch.manual_seed(0)
        callback = BudgetCallback(0.5, 0.9, every=every)
        return run(get_peft_model(copy.deepcopy(base), config), data, tmp_path / folder, callback, **settings), callback

    (whole, callback), (resumed, again) = trainer("whole"), trainer("whole")
    whole.train()
    first, *_, last = [step for step, _ in callback.budget.history]
    assert (first, last) == (0, {"step": 6, "epoch": 2}[every])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert again.budget.history == callback.budget.history
    (tmp_path / "whole" / "checkpoint-2" / "sparsity_budget_0.pt").unlink()
    with pytest.raises(ValueError, match="not saved with BudgetCallback"):
        trainer("whole")[0].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"schedule": 0.9}, TypeError, "schedule must be a BudgetSchedule"),
        ({"importance": "size"}, ValueError, "importance must be sensitivity, magnitude or a callable"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be a number in \[0, 1\)"),
        ({"beta2": "x"}, ValueError, "beta2 must be a number"),
        ({"adapter_name": "other"}, ValueError, "SNELL adapter 'other'"),
    ],
)
def test_what_does_not_fit_is_named(settings, error, sentence):
    with pytest.raises(error, match=sentence):
        SparsityBudget(adapted(), **{"schedule": SCHEDULE, **settings})


def test_a_callback_checks_its_arguments_at_once():
    with pytest.raises(ValueError, match="every must be step or epoch"):
        BudgetCallback(0.5, 0.9, every="batch")
    with pytest.raises(ValueError, match="final must be a sparsity"):
        BudgetCallback(0.5, 1.0)


# --- competition="budget", and layers that are not linear


def of_budget(**settings):
    return adapted(sparsity=0.8, competition="budget", **settings)


def test_a_budget_ends_at_the_adapters_own_sparsity(tmp_path):
    model = of_budget()
    callback = BudgetCallback(0.5)
    run(model, Samples("bert", 12), tmp_path, callback, max_steps=4).train()
    assert callback.budget.schedule.final == 0.8
    assert sum(kept(model)) == BudgetSchedule(0.5, 0.8, 4).kept(4, callback.budget.entries)


def test_training_without_a_budget_warns_once():
    model, with_one, judged = of_budget().train(), of_budget().train(), of_budget().eval()
    SparsityBudget(with_one, SCHEDULE)
    with pytest.warns(UserWarning, match="trains without a budget"):
        model(**batch("bert", 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a budget")
        for silent in (model, with_one, judged):
            silent(**batch("bert", 2))


@pytest.mark.parametrize("wrong", [{"sparsity_pattern": {"query": 0.5}}, {"sparsity": 0.0}])
def test_a_budget_divides_one_total(wrong):
    with pytest.raises(ValueError, match="competition='budget': all layers compete for one total"):
        SnellConfig(**{"competition": "budget", **wrong})


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_and_convolutions_take_part(sparse):
    embedding = torch.nn.Embedding(12, 8, sparse=sparse)
    base = torch.nn.Sequential(embedding, torch.nn.Unflatten(1, (1, 6)), torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten())
    base.append(torch.nn.Linear(4 * 4 * 6, 3))
    model = get_peft_model(base, SnellConfig(r=4, target_modules=["0", "2", "4"], gate="hard"))
    budget = SparsityBudget(model, SCHEDULE)
    assert [layer.name.rsplit(".", 1)[-1] for layer in budget.layers] == ["0", "2", "4"]
    for step in range(1, 11):
        model(torch.randint(12, (5, 6))).square().sum().backward()
        budget.update_and_allocate(step)
        assert sum(kept(model)) == SCHEDULE.kept(step, budget.entries)
        model.zero_grad()
    assert all(score > 0 for score in budget.scores())


def test_micro_batches_count_as_the_batch_they_make():
    base, data = adapted(), batch("bert", 4)
    scores = []
    for pieces in (1, 2, 4):
        model = copy.deepcopy(base).eval()
        budget = SparsityBudget(model, SCHEDULE)
        for share in zip(*(column.chunk(pieces) for column in data.values()), strict=True):
            (model(**dict(zip(data, share, strict=True))).loss / pieces).backward()
        budget.update()
        scores.append(torch.tensor(budget.scores()))
    for others in scores[1:]:
        torch.testing.assert_close(others, scores[0], rtol=1e-4, atol=0)


def test_inspect_shows_how_a_budget_moved(tmp_path):
    run(
        of_budget(),
        Samples("bert", 12),
        tmp_path,
        BudgetCallback(0.5),
        max_steps=4,
        save_steps=4,
        save_strategy="steps",
    ).train()
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "checkpoint-4"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert [one["step"] for one in document["sparsities"]] == [0, 1, 2, 3, 4]
    last = {one["name"]: one["sparsity_asked"] for one in document["layers"]}
    assert document["sparsities"][-1]["layers"] == last
    assert (tmp_path / "out" / "inspect-budget.png").stat().st_size > 5000
    (tmp_path / "checkpoint-4" / "sparsity_budget_0.pt").write_bytes(b"cut")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "checkpoint-4"), "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "again" / "inspect-budget.png").exists()
