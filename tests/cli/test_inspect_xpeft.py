"""``snell inspect`` of masks over a bank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1] / "peft"))
from small_models import build

from snell.cli import main
from snell.peft import MaskedLinear, XpeftConfig


def inspect(folder: Path, *arguments: str):
    return CliRunner().invoke(main, ["inspect", str(folder), "--out", str(folder.parent / "out"), *arguments])


def saved(folder, logits, **settings):
    model = get_peft_model(build("bert"), XpeftConfig(num_adapters=8, **settings))
    for layer in (module for module in model.modules() if isinstance(module, MaskedLinear)):
        for mask, values in zip(layer.masks("default"), logits, strict=True):
            mask.data.copy_(torch.as_tensor(values))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def rows(folder):
    done = inspect(folder)
    assert done.exit_code == 0, done.output
    return json.loads((folder.parent / "out" / "inspect.json").read_text())["layers"]


def test_hard_masks(tmp_path):
    A = [[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]]
    B = [[1.0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]]
    [first, _] = rows(saved(tmp_path, (A, B), k=2, num_profiles=2))
    assert first["name"] == "bert.encoder.layer.0.output.dense"
    assert (first["adapters"], first["profiles"]) == (8, 2)
    assert first["effective_A"] == pytest.approx(2)
    assert first["common"] == pytest.approx(0.75)  # one of two in the first profile, both in the second
    assert first["apart"] == pytest.approx(0.5)  # two profiles that share nothing


def test_soft_masks(tmp_path):
    uniform, sharp = torch.zeros(1, 8), torch.tensor([[0.0, 0, 0, 100, 0, 0, 0, 0]])
    [first, _] = rows(saved(tmp_path, (uniform, sharp), masks="soft"))
    assert first["effective_A"] == pytest.approx(8)
    assert first["effective_B"] == pytest.approx(1)
    assert first["common"] == pytest.approx(1 / 8)
    assert first["apart"] == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors, key: tensors.pop(key), "must hold finite numbers"),
        (lambda tensors, key: tensors[key].fill_(float("nan")), "must hold finite numbers"),
        (lambda tensors, key: tensors.update({key: torch.zeros(1, 5)}), r"of shape (1, 8)"),
        (lambda tensors, key: tensors.clear(), "holds no mask"),
    ],
)
def test_broken_adapters_are_named(change, sentence, tmp_path):
    folder = saved(tmp_path, (torch.zeros(1, 8),) * 2)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, path, {"format": "pt"})
    done = inspect(folder)
    assert done.exit_code == 1
    assert sentence in done.output


def test_a_base_is_not_asked_for(tmp_path):
    done = inspect(saved(tmp_path, (torch.zeros(1, 8),) * 2), "--base", "x")
    assert done.exit_code == 2
    assert "--base is for SNELL adapters" in done.output
