"""Selective freezing under transformers' Trainer; a resumed run equals the one that was not interrupted."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from small_models import batch, build
from torch import nn
from trainer_runs import Samples, StopAfter, losses, run
from tuned import TUNERS, tuned

from snell.cli import main
from snell.training import SafeCallback, cka_importance
from snell.training.callback import _first


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    ("tuner", "name", "settings"),
    [
        ("snell", "bert", {}),  # with dropout: the generators' states come back too
        ("lora", "bert", {}),
        ("snell", "llama", CHECKPOINTING),
        ("snell", "vit", {"restore_callback_states_from_checkpoint": True}),
        ("lora", "llama", {"bf16": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_a_resumed_run_equals_the_one_that_was_not_interrupted(tuner, name, settings, tmp_path):
    base, data = build(name), Samples(name, 10)
    whole = get_peft_model(copy.deepcopy(base), TUNERS[tuner]())
    broken, resumed = copy.deepcopy(whole), get_peft_model(copy.deepcopy(base), TUNERS[tuner]())

    def safe():
        return SafeCallback(samples=4, every=1, share=0.6, warmup=0.2, end=0.9)

    settings = {"max_steps": 8, **settings}
    unbroken = run(whole, data, tmp_path / "whole", callback := safe(), **settings)
    unbroken.train()
    steps = {facts["step"] for facts in callback.freezing.frozen.values()}
    assert min(steps) <= 4 < max(steps)  # some freeze before the interruption, some after it

    settings |= {"save_strategy": "steps", "save_steps": 4}
    run(broken, data, tmp_path / "broken", StopAfter(4), safe(), **settings).train()
    second = run(resumed, data, tmp_path / "broken", safe(), **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))

    (found,) = (c for c in second.callback_handler.callbacks if isinstance(c, SafeCallback))
    assert found.freezing.state_dict() == callback.freezing.state_dict()
    assert set(found.freezing.folded) == set(callback.freezing.folded) == set(callback.freezing.frozen)
    assert losses(second) == losses(unbroken)[-len(losses(second)) :]
    assert second.state.global_step == 8
    assert_equal(bits(resumed), bits(whole))
    assert second.evaluate()["eval_loss"] == unbroken.evaluate()["eval_loss"]
    kept = {id(p) for p in second.optimizer.state}
    assert kept == {id(p) for p in resumed.parameters() if p.requires_grad}


def test_checks_leave_no_trace(tmp_path):
    data = Samples("bert", 6)
    plain = tuned("snell", "bert")
    safe = copy.deepcopy(plain)
    run(plain, data, tmp_path).train()
    run(safe, data, tmp_path, SafeCallback(threshold=0.0, every=1, warmup=0.0)).train()
    assert_equal(bits(safe), bits(plain))


def test_training_stops_once_nothing_trains(tmp_path):
    model = tuned()
    trainer = run(model, Samples("llama", 6), tmp_path, SafeCallback(share=1.0, every=1, end=0.5))
    trainer.train()
    assert trainer.state.global_step == 2  # of 4
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("every", "steps"), [(2, [2, 4, 6, 8]), (0.5, [4, 8]), (0.01, [*range(1, 9)]), ("epoch", [3, 6, 8])]
)
def test_when_it_checks(every, steps, tmp_path, monkeypatch):
    callback, found = SafeCallback(every=every), []
    monkeypatch.setattr("snell.training.callback.SelectiveFreezing.check", lambda self, step: found.append(step))
    run(tuned(), Samples("llama", 6), tmp_path, callback, max_steps=8).train()
    assert found == steps


def test_the_calibration_batch_is_the_first_samples_or_the_given_one(tmp_path):
    data, callback = Samples("llama", 6), SafeCallback(samples=5)
    run(tuned(), data, tmp_path, callback).train()
    assert torch.equal(callback.freezing.batch["input_ids"], data.columns["input_ids"][:5])
    given = batch("llama", 2)
    callback = SafeCallback(given)
    run(tuned(), data, tmp_path, callback).train()
    assert torch.equal(callback.freezing.batch["input_ids"], given["input_ids"])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (data[i % 6] for i in range(100))

    with pytest.raises(ValueError, match="calibration must be given"):
        run(tuned(), Stream(), tmp_path, SafeCallback()).train()
    run(tuned(), Stream(), tmp_path, callback).train()


def test_a_collator_that_draws_gives_a_resumed_run_the_same_batch():
    loader = torch.utils.data.DataLoader([1.0, 2.0], collate_fn=lambda samples: torch.tensor(samples) + torch.rand(2))
    state = torch.get_rng_state()
    first = _first(loader, 2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(_first(loader, 2, seed=7), first)


def test_the_best_model_is_loaded_into_folded_layers(tmp_path):
    model, data = tuned(), Samples("llama", 6)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    callback = SafeCallback(share=0.5, every=1, warmup=0.0, end=0.5)
    trainer = run(model, data, tmp_path, callback, **settings)
    trainer.train()
    assert callback.freezing.frozen
    best = max(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_inspect_shows_who_is_frozen(tmp_path):
    callback = SafeCallback(share=0.5, every=1, warmup=0.0, end=0.5)
    settings = {"save_strategy": "steps", "save_steps": 4}
    run(tuned(), Samples("llama", 6), tmp_path, callback, **settings).train()
    folder, out = tmp_path / "checkpoint-4", tmp_path / "out"
    shown = CliRunner().invoke(main, ["inspect", str(folder), "--out", str(out)])
    assert "SafeCallback froze 7 of 14 layers" in shown.output
    layers = json.loads((out / "inspect.json").read_text())["layers"]
    found = {f"base_model.model.{layer['name']}": layer["frozen_at_step"] for layer in layers}
    steps = {name: facts["step"] for name, facts in callback.freezing.frozen.items()}
    assert found == dict.fromkeys(found) | steps
    (folder / "trainer_state.json").unlink()
    shown = CliRunner().invoke(main, ["inspect", str(folder), "--out", str(out)])
    assert shown.exit_code == 0
    assert "SafeCallback" not in shown.output


def test_what_it_refuses(tmp_path):
    for every in (0, -1, 1.5, "epochs", True):
        with pytest.raises(ValueError, match="every must be"):
            SafeCallback(every=every)
    with pytest.raises(ValueError, match="samples must be"):
        SafeCallback(samples=0)
    with pytest.raises(ValueError, match=re.escape("threshold must be a number in [0, 1]; got 3")):
        SafeCallback(threshold=3)
    with pytest.raises(ValueError, match="model must carry a PEFT tuner's adapters"):
        run(build("llama"), Samples("llama", 6), tmp_path, SafeCallback()).train()
    own = SafeCallback(importance=lambda output, change: cka_importance(output, change))
    with pytest.raises(TypeError, match="importance is not in a checkpoint"):
        SafeCallback(**own.state()["args"])
    two = SimpleNamespace(world_size=2, fsdp=None, deepspeed=None, ddp_find_unused_parameters=False)
    with pytest.raises(ValueError, match="ddp_find_unused_parameters must be True"):
        SafeCallback().on_train_begin(two, None, None, model=tuned())
    with pytest.raises(ValueError, match="does not work with DeepSpeed"):
        SafeCallback().on_train_begin(SimpleNamespace(deepspeed="ds.json"), None, None, model=tuned())
