"""Blocks that fill a GPU's waves: little predicted time lost, a bounded workspace, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from snell import blocks, functional, waves
from snell.kernels import rectangles

H100 = 132

#: GEMM time in blocks over GEMM time of whole matrices, at most. The second shape would reach 1.024 at 2048 tokens with
#: blocks of 30.9 MiB in backward, which leave the factors' gradients no workspace.
WASTE = {
    (8192, 4096, 4096): 1.0005,
    (8192, 4096, 11008): 1.0135,
    (8192, 8192, 28672): 1.0475,
    (2048, 4096, 4096): 1.0005,
    (2048, 4096, 11008): 1.0385,
    (2048, 8192, 28672): 1.166,
}


@pytest.mark.parametrize("tokens, n, m", WASTE)
def test_predicted_waste(tokens, n, m):
    def seconds(*output: int) -> float:
        return 1 / waves.efficiency(*output, H100)

    whole = seconds(tokens, m) + seconds(m, n) + seconds(tokens, n)
    forward = sum(block / m * seconds(tokens, block) for block in waves.rows(tokens, m, n, 2, H100))
    columns = waves.columns(tokens, m, n, 2, H100)
    backward = sum(block / n * (seconds(m, block) + seconds(tokens, block)) for block in columns)
    assert (forward + backward) / whole <= WASTE[tokens, n, m]


def test_efficiency_counts_whole_waves():
    assert waves.efficiency(256 * 12, 128 * 11, 132) == 1.0
    # One tile more takes another wave: of smaller tiles, at less than their rate.
    assert waves.efficiency(256 * 133, 128, 132) < 0.7
    assert waves.efficiency(64, 128, 132) == pytest.approx(0.75 / 132)


@pytest.mark.parametrize("tokens", [0, 1, 300, 8192])
@pytest.mark.parametrize("m, n", [(1, 1), (40, 4096), (4096, 40), (4097, 5000), (28672, 8192), (100000, 70001)])
@pytest.mark.parametrize("element_size", [2, 4])
def test_a_cut_covers_the_layer_within_the_workspace(tokens, m, n, element_size):
    for lines, line, lengths, limit in (
        (m, n, waves.rows(tokens, m, n, element_size, H100), waves.FORWARD_BYTES),
        (n, m, waves.columns(tokens, m, n, element_size, H100), waves.BACKWARD_BYTES),
    ):
        assert sum(lengths) == lines
        assert min(lengths) > 0
        assert lengths[0] == max(lengths)
        assert all(length % waves.MULTIPLE == 0 for length in lengths[:-1])
        assert lengths[0] * line * element_size <= max(limit, 64 * line * element_size)


def test_a_block_and_its_shares_are_within_32_mib():
    assert waves.BACKWARD_BYTES + rectangles.LEAST_BYTES <= 32 * 2**20
    assert rectangles.TOTAL_BYTES <= 32 * 2**20


def test_blocks_of_several_lengths_give_what_the_whole_gives(backend, monkeypatch):
    def step() -> list[torch.Tensor]:
        x, A, B, weight = (torch.randn(*shape) for shape in ((6, 50), (50, 4), (70, 4), (70, 50)))
        x, A, B = (t.requires_grad_() for t in (x, A, B))
        make = {"sparsity": 0.5, "kernel": "piecewise_linear", "groups": 2, "gate": "hard"}
        y = functional.snell_linear(x, weight, None, A, B, torch.tensor([0.3, -0.3]), **make)
        y.square().sum().backward()
        return [y.detach(), x.grad, A.grad, B.grad]

    torch.manual_seed(3)
    whole = step()
    monkeypatch.setattr(blocks, "row_lengths", lambda *_: (30, 30, 10))
    monkeypatch.setattr(blocks, "column_lengths", lambda *_: (20, 20, 9, 1))
    torch.manual_seed(3)
    for one, other in zip(whole, step(), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
