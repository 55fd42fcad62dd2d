"""``snell inspect`` of a RED adapter."""

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
from snell.peft import EditedLinear, RedConfig


def inspect(folder: Path, *arguments: str):
    out = folder.parent / "out"
    return CliRunner().invoke(main, ["inspect", str(folder), "--out", str(out), *arguments]), out


@pytest.fixture
def saved(tmp_path):
    """An adapter on the disk, and the model that was saved."""
    model = get_peft_model(build("llama"), RedConfig(init_weights=False))
    layer = next(m for m in model.modules() if isinstance(m, EditedLinear))
    layer.repr_scaling["default"].weight.data[:6] = -2.0
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_figures_are_those_of_the_vectors(saved):
    folder, model = saved
    done, out = inspect(folder)
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "inspect.json").read_text())["layers"]
    assert [row["name"] for row in rows] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    layers = [m for m in model.modules() if isinstance(m, EditedLinear)]
    for row, layer in zip(rows, layers, strict=True):
        s, c = (v["default"].weight.detach().double() for v in (layer.repr_scaling, layer.repr_bias))
        assert row["out_features"] == 24
        assert row["scaling_mean"] == pytest.approx(s.mean().item())
        assert (row["scaling_smallest"], row["scaling_largest"]) == (s.min().item(), s.max().item())
        assert row["scaling_distance"] == pytest.approx((s - 1).norm().item() / 24**0.5)
        assert row["bias_size"] == pytest.approx(c.norm().item() / 24**0.5)
        assert row["name"] in done.output
    assert rows[0]["negative"] == 0.25
    assert "RED, 96 numbers in 2 layers" in done.output
    assert "25 %" in done.output


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def spoil(tensors, end: str, value) -> None:
    key = next(key for key in tensors if key.endswith(end))
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value


@pytest.mark.parametrize(
    "edit, told",
    [
        (lambda t: t.clear(), "holds no tensor of a RED adapter"),
        (
            lambda t: spoil(t, "0.mlp.down_proj.repr_bias.weight", None),
            "lacks repr_bias of model.layers.0.mlp",
        ),
        (lambda t: spoil(t, "repr_scaling.weight", torch.full((24,), float("nan"))), "holds NaN or infinite values"),
        (lambda t: spoil(t, "repr_bias.weight", torch.zeros(7)), "both must be one vector"),
    ],
)
def test_a_broken_adapter_is_told_in_a_sentence(saved, edit, told):
    folder, _ = saved
    change(folder, edit)
    done, _ = inspect(folder)
    assert done.exit_code == 1
    assert told in done.output
    assert "Traceback" not in done.output


def test_a_base_is_not_asked_for(saved):
    done, _ = inspect(saved[0], "--base", "anything")
    assert done.exit_code == 2
    assert "--base is for SNELL adapters" in done.output
