"""What ``snell study dynamics`` sees of a model's survivors and gradients."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from texts import make_checkpoint, make_wordnet

from snell import SnellLinear, functional
from snell.cli import main
from snell.study.survivors import Watch


def survivors(layer):
    [parameters] = layer.snell_parameters()
    return functional.dense(functional.update(*parameters)) != 0


def test_replaced_survivors_and_the_way_to_the_final_ones_are_counted(monkeypatch):
    monkeypatch.setattr("snell.study.survivors.EVERY", 1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(SnellLinear(12, 10, rank=4), SnellLinear(10, 7, rank=4))
    watch, masks = Watch(model), []
    for step in range(4):
        masks.append(torch.cat([survivors(layer).flatten() for layer in model]))
        watch.look(step, last=step == 3)
        with torch.no_grad():
            for layer in model:
                layer.snell_A.add_(torch.randn_like(layer.snell_A), alpha=0.05)
    total = int(masks[0].sum())
    assert watch.replaced == [int((b & ~a).sum()) / total for a, b in itertools.pairwise(masks)]
    assert all(0 < share < 1 for share in watch.replaced)
    assert watch.final() == [int((mask & masks[-1]).sum()) / total for mask in masks]
    assert watch.looked == [0, 1, 2, 3]


def test_gradients_are_those_of_the_dense_weight():
    torch.manual_seed(0)
    layer = SnellLinear(12, 10, rank=4)
    x = torch.randn(3, 5, 12)
    watch = Watch(torch.nn.Sequential(layer))
    assert watch.look(0, last=False)
    with watch.step():
        layer(x).square().sum().backward()
    weight = (layer.weight + layer.delta_weight()).detach().requires_grad_()
    torch.nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    mask = survivors(layer)
    for name, entries in (("survivors", weight.grad[mask]), ("losers", weight.grad[~mask])):
        assert watch.gradients[name] == [pytest.approx(entries.square().mean().sqrt().item(), rel=1e-5)]
    layer(x).sum().backward()  # nothing listens after the step
    assert len(watch.gradients["survivors"]) == 1


def test_the_command_watches_every_gate(tmp_path):
    make_checkpoint(tmp_path / "checkpoint")
    make_wordnet(tmp_path / "wordnet")
    words = ["study", "dynamics", "--data", f"wordnet={tmp_path / 'wordnet'}", "--checkpoint", tmp_path / "checkpoint"]
    words += ["--steps", 8, "--rank", 2, "--layers", 1, "--labels", 32, "--draws", 2, "--out", tmp_path]
    result = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    methods = json.loads((tmp_path / "dynamics.json").read_text())["methods"]
    assert len(methods) == 4
    for draws in methods.values():
        for draw in draws:
            assert len(draw["replaced"]) == 7
            assert draw["steps"] == [0, 5, 7]
            assert draw["final"][-1] == 1
            assert len(draw["survivors"]) == len(draw["losers"]) == 3
    assert (tmp_path / "dynamics.png").stat().st_size > 1000
