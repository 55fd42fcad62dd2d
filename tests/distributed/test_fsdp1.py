"""The older FSDP on two gloo processes, with the wrap policy that PEFT and Accelerate build."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from small import batch, close, factors, model, train
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def wrap(module: PeftModel, **settings) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **settings)


def is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and not list(module.children()) and weight.requires_grad


def wrapped_leaves_train_as_one_process_does(use_orig_params: bool) -> None:
    leaves = partial(lambda_auto_wrap_policy, lambda_fn=is_trained_leaf)
    blocks = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    single = model()
    start = {key: value.clone() for key, value in factors(single).items()}
    expected = train(single, batch())
    policy = partial(_or_policy, policies=[leaves, blocks])
    module = wrap(model(), auto_wrap_policy=policy, use_orig_params=use_orig_params)
    assert sum(isinstance(m, FullyShardedDataParallel) for m in module.modules()) == 1 + 2 + len(start)
    losses = train(module, batch(dist.get_rank(), dist.get_world_size()), dist.get_world_size())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    with FullyShardedDataParallel.summon_full_params(module):
        found = {key.replace("_fsdp_wrapped_module.", ""): value for key, value in factors(module).items()}
        close(found, factors(single))
        assert any((found[key] - value).abs().max() > 1e-3 for key, value in start.items())


def factors_of_the_bases_dtype_make_one_flat_parameter() -> None:
    for autocast in (True, False):
        half = get_peft_model(
            model().unload().bfloat16(), model().peft_config["default"], autocast_adapter_dtype=autocast
        )
        if autocast:
            with pytest.raises(ValueError, match="uniform dtype"):
                wrap(half, use_orig_params=True)
        else:
            losses = train(wrap(half, use_orig_params=True), batch(dist.get_rank(), 2), 2)
            assert torch.tensor(losses).isfinite().all()


def test_fsdp1_trains_adapters():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    paths = os.pathsep.join(map(str, Path(__file__).parents[:3]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    ran = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=env)
    assert ran.returncode == 0, ran.stderr[-8000:]
    assert "done" in ran.stdout


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for use_orig_params in (False, True):
            wrapped_leaves_train_as_one_process_does(use_orig_params)
        factors_of_the_bases_dtype_make_one_flat_parameter()
        if dist.get_rank() == 0:
            print("done")
    finally:
        dist.destroy_process_group()
