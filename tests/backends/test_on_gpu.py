"""The operations' tests again, with the kernels compiled and every tensor on a GPU; and what needs one.

``python -m pytest -m gpu``
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import test_edit
import test_operations
import torch
from torch.utils.checkpoint import checkpoint

from cases import cases
from snell import SnellLinear, backends, functional
from snell.spec import Spec
from snell.update import Gradients

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

#: Tests of the CPU's native library.
ELSEWHERE = {"test_survivors_are_exact_at_the_size_of_a_language_model"}

for _module in (test_operations, test_edit):
    globals().update(
        {name: test for name, test in vars(_module).items() if name.startswith("test_") and name not in ELSEWHERE}
    )


@pytest.fixture(autouse=True)
def _tensors_on_the_gpu(monkeypatch):
    def of_one_rank(small, *gates):
        # Every rank, group and kernel function is code of its own: one rank, or the compiler takes the hour.
        return cases(small, *gates).map(lambda c: replace(c, m=7 * c.m, n=7 * c.n, groups=2, per_group=4))

    monkeypatch.setattr(test_operations, "cases", of_one_rank)
    with torch.device("cuda"):
        yield


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture
def small() -> bool:
    return True


def layer_and_input(tokens=300, dtype=torch.bfloat16, **options):
    layer = SnellLinear(520, 390, rank=16, dtype=dtype, **options)
    return layer, torch.randn(tokens, 520, dtype=dtype, requires_grad=True)


def step(layer, x):
    for t in (x, *layer.parameters()):
        t.grad = None
    y = layer(x)
    y.backward(torch.ones_like(y))
    return y.detach().clone(), *(t.grad.clone() for t in (x, layer.snell_A, layer.snell_B))


@pytest.mark.parametrize("m, n", [(28672, 8192), (70001, 33000)])
def test_survivors_are_exact_and_agree_at_full_size(m, n):
    """Also where a matrix holds more than 2^31 entries: merge and factor_grad count what select promised."""
    A, B, theta = torch.randn(n, 16), torch.randn(m, 16), torch.tensor([0.1, -0.1])
    k = math.ceil(0.9 * m * n)
    hard = functional.update(A, B, theta, Spec(16, 0.9, gate="hard"))
    ungated = hard._replace(spec=Spec(16, 0.9, gate="none"))
    tau = hard.tau
    below = at = gone = 0
    for rows in range(0, m, 4096):
        block = hard.rows(slice(rows, rows + 4096))
        K = functional.dense(ungated, slice(rows, rows + 4096))
        below, at = below + int((K.abs() < tau).sum()), at + int((K.abs() == tau).sum())
        merged = torch.randn_like(K)
        backends.of(A).factor_grad(merged, block, Gradients.zeros(block), None, merged)
        gone += int((merged == 0).sum())
    assert below < k <= below + at
    assert gone == below + at


def test_a_step_captured_in_a_graph_replays_to_the_same_bits():
    layer, x = layer_and_input()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    for t in (x, *layer.parameters()):
        t.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(torch.ones_like(y))
    captured = (y, x.grad, layer.snell_A.grad, layer.snell_B.grad)
    # The replay must select for the factors it finds, not for those it was captured with.
    layer.snell_A.data.mul_(1.3)
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(a.equal(b) for a, b in zip(replayed, step(layer, x), strict=True))


def test_nothing_waits_for_the_device():
    layer, x = layer_and_input()
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_run_after_run_on_any_stream():
    layer, x = layer_and_input()
    first = step(layer, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = step(layer, x)
    torch.cuda.synchronize()
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))


def test_compiled_whole():
    layer, x = layer_and_input()
    expected = step(layer, x)
    got = step(torch.compile(layer, fullgraph=True), x)
    assert all(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-3) for a, b in zip(expected, got, strict=True))


def test_under_checkpointing_the_gradients_have_the_same_bits():
    layer, x = layer_and_input()
    expected = step(layer, x)[1:]
    for t in (x, *layer.parameters()):
        t.grad = None
    checkpoint(layer, x, use_reentrant=False).backward(torch.ones(x.shape[0], 390, dtype=x.dtype))
    got = (x.grad, layer.snell_A.grad, layer.snell_B.grad)
    assert all(a.equal(b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_tokens_agree_with_the_merged_layer(tokens, dtype):
    layer, x = layer_and_input(tokens, dtype)
    with torch.no_grad():
        unmerged = layer(x)
        layer.merge()
        merged = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    # The weights are the same bits; y sums 520 products in float32 and is rounded once.
    scale = x.double().abs() @ layer.weight.double().abs().T + 1
    bound = torch.finfo(dtype).eps * merged.abs() + 64 * torch.finfo(torch.float32).eps * scale
    assert bool(((unmerged - merged).abs() <= bound).all())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_runs_on_the_device_it_lives_on():
    layer, x = layer_and_input()
    expected = step(layer, x)
    other = layer.to("cuda:1")
    got = step(other, x.detach().to("cuda:1").requires_grad_())
    assert all(a.equal(b.to(a.device)) for a, b in zip(expected, got, strict=True))
