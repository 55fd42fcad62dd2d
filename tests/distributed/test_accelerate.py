"""Accelerate on two gloo processes: training is one process's, and a resumed run has an unbroken one's bits.

On a CPU Accelerate runs DDP alone: test_fsdp1.py and workers.py use PyTorch's FSDP.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from small import STEPS, batch, close, factors, model, optimizer, train


def prepared():
    """Accelerate's accelerator, model and optimizer."""
    accelerator, single = Accelerator(cpu=True), model()
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


def two_processes_do_what_one_does() -> None:
    single = model()
    expected = train(single, batch())
    accelerator, module, sgd = prepared()
    assert accelerator.num_processes == 2
    losses = steps(accelerator, module, sgd, STEPS)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    close(factors(accelerator.unwrap_model(module)), factors(single))


def a_resumed_run_has_the_bits_of_an_unbroken_one() -> None:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    accelerator, module, sgd = prepared()
    steps(accelerator, module, sgd, 1)
    accelerator.save_state(folder[0])
    expected = steps(accelerator, module, sgd, 2)
    again, resumed, sgd = prepared()
    again.load_state(folder[0])
    assert steps(again, resumed, sgd, 2) == expected
    ours, theirs = factors(again.unwrap_model(resumed)), factors(accelerator.unwrap_model(module))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_accelerate_trains_and_resumes():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    paths = os.pathsep.join(map(str, Path(__file__).parents[:3]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    ran = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=env)
    assert ran.returncode == 0, ran.stderr[-8000:]
    assert "done" in ran.stdout


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_processes_do_what_one_does()
    a_resumed_run_has_the_bits_of_an_unbroken_one()
    if dist.get_rank() == 0:
        print("done")
    dist.destroy_process_group()
