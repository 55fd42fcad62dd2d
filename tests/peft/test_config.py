"""SnellConfig says no to what does not fit, and survives a round trip through JSON."""

import json

import pytest
import torch
from peft import PeftConfig

from snell.peft import SnellConfig


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"r": 0}, ValueError, "r must be"),
        ({"r": 2.0}, ValueError, "r must be"),
        ({"r": 5}, ValueError, "multiple of groups"),
        ({"sparsity": 1.0}, ValueError, "sparsity"),
        ({"sparsity": float("nan")}, ValueError, "sparsity"),
        ({"sparsity": "0.9"}, TypeError, "sparsity"),
        ({"kernel": "gaussian"}, ValueError, "kernel"),
        ({"groups": 0}, ValueError, "groups"),
        ({"gate": "none at all"}, ValueError, "gate"),
        ({"r": 10**9}, ValueError, "r must be an int from 1 to 65536"),
        ({"scale": "big"}, TypeError, "scale"),
        ({"scale": 1e308}, ValueError, "scale must be finite in float32"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"train_theta": "yes"}, ValueError, "train_theta"),
        ({"init_weights": "lora"}, ValueError, "init_weights"),
        ({"bias": "lora_only"}, ValueError, "bias"),
        ({"rank_pattern": {"q": 3}}, ValueError, "multiple of groups"),
        ({"rank_pattern": "x"}, TypeError, "rank_pattern must be a dict"),
        ({"sparsity_pattern": {"q": 2.0}}, ValueError, "sparsity"),
        ({"sparsity_pattern": [0.5]}, TypeError, "sparsity_pattern must be a dict"),
        ({"target_modules": "q", "layers_to_transform": [0]}, ValueError, "layers_to_transform"),
        ({"layers_pattern": "h"}, ValueError, "layers_pattern"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings, error, named):
    with pytest.raises(error, match=named):
        SnellConfig(**settings)


def test_a_saved_config_holds_plain_values_and_comes_back_equal(tmp_path):
    config = SnellConfig(
        r=6,
        sparsity=0.75,
        kernel="sigmoid",
        target_modules=["q", "v"],
        exclude_modules=["k"],
        modules_to_save=["classifier"],
        rank_pattern={"v": 2},
        sparsity_pattern={"v": 0.5},
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, (str, int, float, bool))

    assert saved["peft_type"] == "SNELL"
    assert plain(saved)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert SnellConfig.from_pretrained(tmp_path) == config


def test_a_config_settles_the_scale_that_it_does_not_get():
    assert SnellConfig().scale == 3.0
    assert SnellConfig(gate="hard").scale == 0.1
    assert SnellConfig(sparsity=0.0).scale == 0.1
    assert SnellConfig(scale=0.7).scale == 0.7
    assert SnellConfig().to_dict()["scale"] == 3.0


def test_the_largest_scale_gives_finite_scalars():
    assert torch.tensor(SnellConfig(scale=3.4028234e38).spec(2, 0.5).initial_theta(3.4028234e38)).isfinite().all()
