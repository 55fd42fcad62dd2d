"""What a layer allocates, measured in a fresh process: torch's allocations one by one, and the process's peak."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from snell import backends

MIB = 2**20

pytestmark = pytest.mark.skipif("cpu" not in backends.AVAILABLE, reason="needs the native library: minutes without")

# Peak resident memory over a call, reset by the kernel just before it; and what torch allocates within it.
PRELUDE = """
import json, math, sys, time
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from snell import competition, functional

torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))
OPTIONS = {"kernel": "piecewise_linear", "groups": 2}
THETA = torch.tensor([0.1, -0.1])

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def peak_growth(function):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    result = function()
    return resident("VmHWM") - before, result

def allocated_at_peak(function):
    '''The most bytes torch held at once within the call, over what it held before.'''
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, result
"""


def measure(script: str, *arguments: object) -> dict:
    program = PRELUDE + textwrap.dedent(script)
    seed = int.from_bytes(os.urandom(2), "big")
    # Large blocks go back to the system at once, so that the peak counts what is in use and not what malloc keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", program, str(seed), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_a_large_layer_forward_and_backward_allocates_under_32_mib():
    measured = measure(
        """
        m, n, tokens, rank = 11008, 4096, 16, 32
        x, weight, grad_y = torch.randn(tokens, n), torch.randn(m, n), torch.randn(tokens, m)
        A, B = torch.randn(n, rank) * 0.1, torch.randn(m, rank) * 0.1
        leaves = [x, A, B]

        def step():
            for t in leaves:
                t.requires_grad_().grad = None
            y = functional.snell_linear(x, weight, None, A, B, THETA, sparsity=0.9, **OPTIONS, gate="soft")
            y.backward(grad_y)
            return y

        # What any layer costs a process once: the GEMM library's own buffers, and the hundreds of Python modules that
        # torch imports at the first backward(gradient).
        torch.mm(x, weight.t())
        torch.mm(grad_y, weight)
        torch.mm(grad_y.t(), x)
        few = [torch.randn(64, 8, requires_grad=True) for _ in range(4)]
        functional.snell_linear(few[0], few[1], None, few[2][:8], few[3], THETA, sparsity=0.5, **OPTIONS,
                                gate="soft").backward(torch.ones(64, 64))
        outputs = sum(t.nbytes for t in [grad_y, *leaves])  # y, and a gradient of each leaf
        peak, _ = peak_growth(step)
        competition.forget()
        for t in leaves:
            t.grad = None
        allocated, _ = allocated_at_peak(step)
        print(json.dumps({"resident": peak - outputs, "torch": allocated - outputs}))
        """
    )
    # A block of the workspace must show up in both: else nothing was measured.
    for what, grown in measured.items():
        assert 8 * MIB < grown < 32 * MIB, f"{what}: {grown / MIB:.1f} MiB beyond inputs, outputs and gradients"


@pytest.mark.parametrize("sparsity", [0.9, 0.999])
def test_selection_over_a_vocabulary_is_exact_and_allocates_under_64_mib(sparsity):
    measured = measure(
        """
        m, n, rank, sparsity = int(sys.argv[2]), 4096, 8, float(sys.argv[3])
        A, B = torch.randn(n, rank), torch.randn(m, rank)
        warm = torch.randn(64, rank)
        functional.select_threshold(warm, warm, THETA, sparsity=0.5, **OPTIONS)
        started = time.perf_counter()
        peak, tau = peak_growth(lambda: functional.select_threshold(A, B, THETA, sparsity=sparsity, **OPTIONS))
        seconds = time.perf_counter() - started
        # tau is the k-th smallest if and only if fewer than k lie below it and at least k do not lie above.
        below = ties = 0
        for rows in B.split(1024):
            magnitudes = functional.merge(A, rows, THETA, torch.zeros(()), **OPTIONS, gate="none").abs_()
            below += magnitudes.lt(tau).count_nonzero().item()
            ties += magnitudes.eq(tau).count_nonzero().item()
        print(json.dumps({"peak": peak, "below": below, "ties": ties, "entries": m * n, "tau": tau.item(),
                          "k": math.ceil(sparsity * (m * n)), "seconds": seconds}))
        """,
        128256,
        sparsity,
    )
    assert measured["below"] < measured["k"] <= measured["below"] + measured["ties"], measured
    assert 0 < measured["peak"] < 64 * MIB, f"the process grew by {measured['peak'] / MIB:.1f} MiB"
