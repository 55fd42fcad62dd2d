"""``refresh_thresholds`` on adapted models: every adapter's thresholds, and none of sharded factors."""

import pytest
import torch
import torch.distributed as dist
from small_models import adapted, batch, config, logits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from snell import refresh_thresholds
from snell.competition import memo
from snell.peft import AdaptedLinear


@pytest.fixture
def selections(monkeypatch):
    """Grows by an entry for each selection."""
    found, remember = [], memo.remember
    monkeypatch.setattr(memo, "remember", lambda key, compute: remember(key, lambda: (found.append(1), compute())[1]))
    return found


def test_the_thresholds_of_every_adapter_are_selected(selections):
    model, _ = adapted("llama")
    model.add_adapter("second", config(r=6, kernel="rbf"))
    layers = sum(isinstance(module, AdaptedLinear) for module in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    selections.clear()
    assert refresh_thresholds(model) == 2 * layers
    assert len(selections) == 2 * layers
    inputs = batch("llama")
    for name in ("default", "second"):
        model.set_adapter(name)
        logits(model, inputs)
    assert len(selections) == 2 * layers


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_factors_are_left_until_they_are_gathered(mesh, selections):
    model, _ = adapted("llama")
    inputs = batch("llama")
    expected = logits(model, inputs)
    blocks = list(model.base_model.model.model.layers)
    fully_shard(blocks[0], mesh=mesh)
    sharded = [m for m in blocks[0].modules() if isinstance(m, AdaptedLinear)]
    assert all(isinstance(layer.snell_A["default"].weight, DTensor) for layer in sharded)
    whole = [m for m in blocks[1].modules() if isinstance(m, AdaptedLinear)]
    selections.clear()
    assert refresh_thresholds(model) == len(whole)
    assert torch.equal(logits(model, inputs), expected)
