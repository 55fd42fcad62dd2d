"""The memory that the paper's Table A12 is compared with is counted, and its parts are those of a step."""

import json
from pathlib import Path

import pytest
import torch

from snell.bench import report
from snell.bench.memory import counted_peak_bytes
from snell.bench.names import VITS
from snell.bench.paper import memory

SIZES = {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
MODELS = ("ViT-B/16", "ViT-L/16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory")
    report.publish(out, "memory", memory, memory.measure("cpu", MODELS, ("published",), **SIZES))
    return out


@pytest.fixture(scope="module")
def document(folder: Path) -> dict:
    return json.loads((folder / "memory-cpu.json").read_text())


def test_the_count_sees_what_is_freed_and_what_stays() -> None:
    kept = []
    assert counted_peak_bytes(lambda: torch.ones(2**20).sum()) == pytest.approx(2**22, abs=64)
    assert counted_peak_bytes(lambda: kept.append(torch.ones(2**20))) == 2**22

    def two_in_turn() -> None:
        for _ in range(2):
            torch.ones(2**20)

    assert counted_peak_bytes(two_in_turn) == 2**22


def test_the_parts_sum_to_the_total_and_none_is_negative(document: dict) -> None:
    for methods in document["models"].values():
        for entry in methods.values():
            assert all(entry[part] >= 0 for part in memory.PARTS)
            assert sum(entry[part] for part in memory.PARTS) == entry["total_bytes"]


def test_gradients_are_as_large_as_what_is_trained_and_adamw_twice_that(document: dict) -> None:
    for methods in document["models"].values():
        for entry in methods.values():
            assert entry["gradient_bytes"] == 4 * entry["trainable"]
            assert 0 <= entry["optimizer_bytes"] - 2 * entry["gradient_bytes"] < 1024  # step counts


def test_both_methods_hold_and_train_the_same(document: dict) -> None:
    for methods in document["models"].values():
        snell, lora = methods["snell"], methods["lora"]
        assert snell["trainable"] == lora["trainable"] == 2 * memory.RANK * (4 * (40 + 40) + 2 * (40 + 80))
        assert abs(snell["model_bytes"] - lora["model_bytes"]) < 1024  # constants of the kernel function


def test_the_published_algorithm_saves_a_matrix_a_layer_where_snell_saves_none(document: dict) -> None:
    # The first block's queries, keys and values need no gradient of their input, and so no merged weight.
    matrices = 4 * (2 * (4 * 40 * 40 + 2 * 40 * 80) - 3 * 40 * 40)
    thresholds = 4 * 2 * 6
    for methods in document["models"].values():
        assert methods["published"]["saved_bytes"] - methods["snell"]["saved_bytes"] == matrices - thresholds
        assert methods["snell"]["saved_bytes"] <= methods["lora"]["saved_bytes"]


def test_the_report_sets_the_papers_ratio_beside_ours(document: dict, folder: Path) -> None:
    text = memory.report(document)
    entries = document["models"]["ViT-B/16"]
    ratio = entries["snell"]["total_bytes"] / entries["lora"]["total_bytes"]
    assert f"| ViT-B/16 | 1.082 | {ratio:.4f} |" in text
    assert (folder / "memory-cpu.png").stat().st_size > 10_000


def test_a_ratio_over_the_target_is_called_one() -> None:
    results = {"ViT-L/16": {"lora": {"total_bytes": 1000}, "snell": {"total_bytes": 1011}}}
    assert memory.verdict(results).endswith("| **no** |")


def test_the_paper_has_a_figure_for_every_model() -> None:
    assert memory.PAPER.keys() == VITS.keys()
