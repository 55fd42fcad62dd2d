"""A short run of the benchmark of selective freezing, and its count of products."""

from functools import partial

import pytest
import torch
from torch import nn

from snell.bench import digits
from snell.bench.contenders import ADAPT
from snell.bench.experiments import freezing


@pytest.fixture(scope="module")
def document() -> dict:
    short = digits.Settings(pretraining_steps=5, steps=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freezing, "on_digits", partial(freezing.on_digits, short))
        return freezing.measure(seeds=2, share=0.5)


def test_what_freezes_saves(document):
    for row in document["results"]:
        for run in row["runs"]:
            assert len(run["frozen"]) == run["adapters"] // 2 == 9
            for key in ("bytes", "saved_bytes", "flops"):
                over = [at[key] for at in run["over"]]
                assert over == sorted(over, reverse=True)
                assert over[-1] < run["safe"][key] < run["plain"][key] == over[0]
            assert run["check_seconds"] > 0
    machine = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    text = freezing.report({"command": "snell bench freezing", "machine": machine, **document})
    assert "| SNELL | -" in text
    assert "| PEFT LoRA | -" in text


@pytest.mark.parametrize(("method", "trained", "of_factors"), [("snell", 3, 0), ("lora", 2, 3)])
def test_the_products_of_a_step_are_counted(method, trained, of_factors):
    m, n, tokens, rank = 12, 20, 7, 2
    product, model = 2 * m * n * tokens, ADAPT[method](nn.Sequential(nn.Linear(n, m)), rank)
    x = torch.randn(tokens, n, requires_grad=True)
    factors = 2 * tokens * rank * (m + n)
    assert freezing.flops(lambda: model(x).sum()) == trained * product + of_factors * factors
    model.requires_grad_(False)
    assert freezing.flops(lambda: model(x).sum()) == 2 * product + (2 * factors if of_factors else 0)
