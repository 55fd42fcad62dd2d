"""The RED benchmark's methods train what they say, and plain PyTorch's RED computes what RED does."""

import copy

import pytest
import torch

from snell.bench.experiments import models, red
from snell.bench.memory import num_trained
from snell.bench.names import RED_METHODS
from snell.bench.workloads import Training, Workload, vit

SIZES = {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
RANK = 4

#: Two blocks of width 40 with an inner width of 80.
TRAINED = {
    "red": 2 * 2 * 40,
    "red-plain": 2 * 2 * 40,
    "ia3": 2 * (40 + 40 + 80),
    "lora-edited": 2 * RANK * (40 + 80),
    "lora": 2 * RANK * (4 * (40 + 40) + 2 * (40 + 80)),
}


def tiny_vit(device: str = "cpu") -> Workload:
    torch.manual_seed(0)
    return vit("ViT-B/16", device, images=2, **SIZES)


@pytest.mark.parametrize("method", RED_METHODS)
def test_each_method_trains_its_numbers(method: str) -> None:
    assert num_trained(Training(method, tiny_vit(), RANK).model) == TRAINED[method]


def test_plain_red_takes_the_same_steps() -> None:
    losses = {}
    for method in ("red", "red-plain"):
        training = Training(method, tiny_vit(), RANK)
        losses[method] = []
        for _ in range(4):
            losses[method].append(training.forward().item())
            training.step()
    torch.testing.assert_close(losses["red"], losses["red-plain"])
    assert losses["red"][-1] < losses["red"][0]


def test_the_report_has_a_row_for_each_method() -> None:
    result = models.measure_model(tiny_vit, "cpu", RANK, 2, RED_METHODS)
    entries = result["methods"]
    assert entries["lora"]["ratio_to_lora"] == 1
    # Outputs are kept, and not the inputs that are twice as wide and the factors' products.
    assert entries["red"]["saved_bytes"] <= entries["red-plain"]["saved_bytes"]
    document = {"command": "snell bench red", "machine": {"cpu": "a", "threads": 1, "torch": "2"}, "models": [result]}
    text = red.report(copy.deepcopy(document))
    assert all(f"| {label} |" in text for label in RED_METHODS.values())
