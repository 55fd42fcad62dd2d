"""The X-PEFT benchmark: its two ways to train profiles sum the same losses, and its files have the stated size."""

import pytest
import torch
import transformers as tf

from snell.bench.experiments import profiles


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = tf.BertConfig(vocab_size=50, **sizes)
    monkeypatch.setattr(profiles, "bert", lambda: tf.BertForSequenceClassification(config).eval())


def test_every_bank_has_a_row_for_each_kind_of_masks(tiny):
    document = profiles.measure((8, 20), 4, 3, 2)
    rows = document["rows"]
    assert [(row["adapters"], row["masks"]) for row in rows] == [(8, "hard"), (8, "soft"), (20, "hard"), (20, "soft")]
    assert [row["file_bytes"] for row in rows if row["masks"] == "hard"] == [32 + 2 * 2 * 1, 32 + 2 * 2 * 3]
    assert [row["bank_bytes"] for row in rows[::2]] == [2 * 2 * 2 * num * 24 * 4 for num in (8, 20)]
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
    machine = {"cpu": "a", "threads": 1, "torch": "2"}
    text = profiles.report({"command": "snell bench profiles", "machine": machine, **document})
    assert text.count("| hard |") == 2


def test_a_profile_alone_has_the_gradient_that_it_has_together(tiny, monkeypatch):
    found = {}

    def once(steps, device, repetitions):
        found.update(steps)
        return {name: [1.0] for name in steps}

    models = []
    monkeypatch.setattr(profiles, "take_turns", once)
    make = profiles.get_peft_model
    monkeypatch.setattr(profiles, "get_peft_model", lambda *args: models.append(make(*args)) or models[-1])
    profiles.measure((8,), 4, 1, 1)
    for one, many in zip(models[::2], models[1::2], strict=True):
        one.zero_grad()
        many.zero_grad()
    found["together"]()
    found["alone"]()
    pairs = zip(models[-2].parameters(), models[-1].parameters(), strict=True)
    for alone, together in ((a, b) for a, b in pairs if a.requires_grad):
        torch.testing.assert_close(together.grad, alone.grad, rtol=1e-3, atol=1e-6)
