"""Accelerate on two gloo processes: sharded training is one process's, and a resumed run has an unbroken one's bits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from small import STEPS, batch, close, factors, model, optimizer, train

KINDS = ("FSDP1", "FSDP2")


def prepared(kind: str):
    """Accelerate's accelerator, model and optimizer."""
    single = model()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(kind[-1]),
        use_orig_params=kind == "FSDP1",
        auto_wrap_policy=fsdp_auto_wrap_policy(single) if kind == "FSDP1" else "transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.FSDP
    return accelerator, *accelerator.prepare(single, optimizer(single))


def steps(accelerator, module, optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = module(**batch(accelerator.process_index, accelerator.num_processes)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def whole(accelerator, module) -> dict[str, torch.Tensor]:
    """The factors, gathered, by their own names."""
    state = accelerator.get_state_dict(module)
    return {key: value for key, value in state.items() if "snell_" in key}


def is_one_process(kind: str) -> None:
    single = model()
    expected = train(single, batch())
    run = prepared(kind)
    losses = steps(*run, STEPS)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    found = whole(*run[:2])
    if dist.get_rank() == 0:
        close(found, factors(single))


def resumes(kind: str) -> None:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    run = prepared(kind)
    steps(*run, 1)
    run[0].save_state(folder[0])
    expected = steps(*run, 2)
    end = whole(*run[:2])
    again = prepared(kind)
    again[0].load_state(folder[0])
    assert steps(*again, 2) == expected
    found = whole(*again[:2])
    assert found.keys() == end.keys()
    assert all(torch.equal(found[key], value) for key, value in end.items())


@pytest.fixture(scope="module")
def launched() -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, *KINDS]
    paths = os.pathsep.join(map(str, Path(__file__).parents[:3]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(launch, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", [is_one_process, resumes], ids=lambda work: work.__name__)
def test_accelerate(launched, work, kind):
    assert f"done: {work.__name__} {kind}\n" in launched.stdout, launched.stderr[-8000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[1:]:
        for work in (is_one_process, resumes):
            work(kind)
            if dist.get_rank() == 0:
                print(f"done: {work.__name__} {kind}")
    dist.destroy_process_group()
