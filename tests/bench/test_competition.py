"""The benchmark of competitions over layers: what it times is what it says, and its report."""

from __future__ import annotations

import torch
import transformers as tf

from snell.bench.experiments import competition
from snell.bench.workloads import Workload


def test_the_shapes_are_the_models():
    name, shapes = competition.SHAPES["llama-7b"]
    assert (name, len(shapes)) == ("Llama-2-7B", 224)
    # All of Llama-2-7B's 6.74e9 parameters, but for embeddings, head and norms.
    assert sum(m * n for m, n in shapes) == 6_476_005_376
    assert len(competition.SHAPES["vit-b"][1]) == 72


def test_both_ways_are_timed_and_reported(monkeypatch):
    monkeypatch.setitem(competition.SHAPES, "vit-b", ("tiny", competition._blocks(2, 24, 40, 1)))
    monkeypatch.setitem(competition.SHAPES, "llama-7b", ("small", competition._blocks(1, 48, 64, 2)))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=50, **sizes))
    batch = {"input_ids": torch.randint(50, (2, 7)), "labels": torch.tensor([0, 1])}
    monkeypatch.setattr(competition, "vit_b", lambda device: Workload("tiny", model, batch))
    document = competition.measure((), 4, 3)
    assert [row["layers"] for row in document["rows"]] == [12, 7]
    for row in document["rows"]:
        assert row["seconds"]["alone"] > 0 < row["seconds"]["together"]
    assert 0 < document["budget"]["budget"] < document["budget"]["step"]
    machine = {"cpu": "a", "threads": 1, "torch": "2"}
    text = competition.report({"command": "snell bench competition", "machine": machine, **document})
    assert "| tiny | 12 |" in text
    assert "% of a training step" in text
