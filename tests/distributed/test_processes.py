"""Two processes, launched by torchrun on gloo, do what one does; each property is a function of workers.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = Path(__file__).with_name("workers.py")
WORK = (
    "ddp",
    "red_ddp",
    "mixture_ddp",
    "competing_ddp",
    "fsdp",
    "red_fsdp",
    "mixture_fsdp",
    "fsdp_mixed_precision",
    "freezing_under_ddp",
    "freezing_under_fsdp",
    "selection",
    "splits",
    "tensor_parallel",
    "mixture_tensor_parallel",
    "tensor_parallel_before_peft",
    "identity_start",
    "red_tensor_parallel",
    "other_layouts_are_refused",
)


@pytest.fixture(scope="module")
def launched() -> subprocess.CompletedProcess:
    """All of it in one launch: most of the time goes into starting processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKERS), *WORK]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize("work", WORK)
def test_two_processes_do_what_one_does(launched, work):
    assert f"done: {work}\n" in launched.stdout, launched.stderr[-8000:]
