"""The layer as blocks: any cut gives the same numbers, and nothing is held beyond the workspace."""

import pytest
import torch

from snell import blocks, functional

PIECEWISE = {"sparsity": 0.8, "kernel": "piecewise_linear", "groups": 2, "gate": "soft"}


@pytest.mark.parametrize(
    "bytes_per_line, lines, expected",
    [
        (4096 * 4, 4096, 1024),
        (100, 10, 10),
        (4096 * 4, 1000, 1000),
        (2**20, 4096, 64),
        (2**30, 4096, 64),
        (2**30, 5, 5),
        (0, 7, 7),
        (11008 * 4, 4096, 320),
    ],
)
def test_block_length(bytes_per_line, lines, expected):
    length = blocks.block_length(bytes_per_line, lines)
    assert length == expected
    assert length == lines or length % blocks.BLOCK_MULTIPLE == 0
    assert length * bytes_per_line <= max(blocks.WORKSPACE_BYTES, 64 * bytes_per_line)


def run(m, n, dtype, transposed, needs):
    rng = torch.Generator().manual_seed(3)
    inputs = {
        "x": torch.randn(2, 5, n, generator=rng),
        "weight": torch.randn(m, n, generator=rng),
        "bias": torch.randn(m, generator=rng),
    }
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    if transposed:
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    inputs |= {"A": torch.randn(n, 6, generator=rng), "B": torch.randn(m, 6, generator=rng)}
    inputs |= {"theta": torch.tensor([0.3, -0.3])}
    leaves = {name: t.requires_grad_(name in needs) for name, t in inputs.items()}
    y = functional.snell_linear(**leaves, **PIECEWISE)
    y.backward(torch.randn(y.shape, generator=rng).to(dtype))
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items() if name in needs}}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [("x", "A", "B", "theta"), ("x",), ("A", "B"), ("x", "weight", "bias", "A")])
def test_blocks_give_what_the_whole_gives(backend, small, monkeypatch, needs, dtype, transposed):
    # 64 lines a block of layers a little over two blocks each way: full, full and ragged.
    m, n = (70, 67) if small else (141, 133)
    whole = run(m, n, dtype, transposed, needs)
    monkeypatch.setattr(blocks, "WORKSPACE_BYTES", 1)
    in_blocks = run(m, n, dtype, transposed, needs)
    for name, value in whole.items():
        if name in ("y", "x"):
            # Every entry comes out of one GEMM over the same operands, whatever the block: rounded once.
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        else:
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        error = (in_blocks[name].float() - value.float()).norm() / value.float().norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


def test_the_workspace_of_a_transposed_weight_is_transposed():
    workspace = torch.empty(12)
    weight = torch.empty(5, 7).t()
    assert blocks._block(workspace, weight, 3, 4).stride() == (1, 3)
    assert blocks._block(workspace, weight.contiguous(), 3, 4).stride() == (4, 1)
    assert blocks._block(workspace, None, 3, 4).stride() == (4, 1)
