"""The layer as blocks of library GEMMs around the backend's block operations, written once.

Forward builds W0 + dW a block of rows at a time and multiplies. Backward goes by blocks of columns, so
that every entry of dX comes out of one GEMM and is rounded once: G of the block first, then one pass
that turns G into factor gradients and leaves W0 + dW of the same block, then dX. Nothing of size m*n
is allocated: the workspace is bounded whatever the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes of workspace a pass may hold. Blocks of this size lose nothing to the GEMM's edges and, on a CPU,
#: stay in the last-level cache between the pass that writes them and the GEMM that reads them.
WORKSPACE_BYTES = 16 * 2**20

#: Blocks are multiples of this many rows or columns where they are not the whole.
BLOCK_MULTIPLE = 64


def block_length(bytes_per_line: int, lines: int) -> int:
    """How many rows (or columns) of ``bytes_per_line`` one block holds."""
    length = WORKSPACE_BYTES // max(bytes_per_line, 1)
    if length >= lines:
        return max(lines, 1)
    return max(length - length % BLOCK_MULTIPLE, min(BLOCK_MULTIPLE, lines), 1)


def _block(workspace: Tensor, weight: Tensor | None, rows: int, cols: int) -> Tensor:
    """A [rows, cols] block at the head of the workspace, laid out as the weight is (Conv1D's is transposed)."""
    if weight is not None and weight.stride(1) != 1 and weight.stride(0) == 1:
        return workspace[: rows * cols].view(cols, rows).t()
    return workspace[: rows * cols].view(rows, cols)


def merge(
    A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, weight: Tensor | None, kernel: str, groups: int, gate: str
) -> Tensor:
    """``snell::merge``."""
    out = torch.empty(B.shape[0], A.shape[0], dtype=(A if weight is None else weight).dtype, device=A.device)
    torch.ops.snell.merge_out.default(A, B, theta, tau, weight, out, kernel, groups, gate)
    return out


def factor_gradients(
    G: Tensor, A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, kernel: str, groups: int, gate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``snell::merge_backward``: dA, dB and dtheta from the whole of ``G [m, n]``."""
    grads = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(theta)
    torch.ops.snell.factor_grad.default(G, A, B, theta, tau, None, None, *grads, kernel, groups, gate)
    return grads


def linear_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor,
    kernel: str,
    groups: int,
    gate: str,
) -> Tensor:
    """``snell::linear``."""
    m, n = B.shape[0], A.shape[0]
    y = x.new_empty(*x.shape[:-1], m)
    if not y.numel():
        return y
    x2, y2 = x.reshape(-1, n), y.view(-1, m)
    bias = bias if bias is None else bias.to(x.dtype)
    rows = block_length(n * x.element_size(), m)
    workspace = x.new_empty(rows * n)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        block = _block(workspace, weight, stop - start, n)
        W_block = None if weight is None else weight[start:stop]
        torch.ops.snell.merge_out.default(A, B[start:stop], theta, tau, W_block, block, kernel, groups, gate)
        if bias is None:
            torch.mm(x2, block.t(), out=y2[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x2, block.t(), out=y2[:, start:stop])
    return y


def linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor,
    kernel: str,
    groups: int,
    gate: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``snell::linear_backward``; gradients that are not needed come back empty."""
    m, n = B.shape[0], A.shape[0]
    dy = grad_y.reshape(-1, m)
    grad_x = dy.new_empty((*grad_y.shape[:-1], n) if need_x else (0,))
    grad_weight = torch.empty_like(weight) if need_weight and weight is not None else dy.new_empty(0)
    bias_dtype = dy.dtype if weight is None else weight.dtype
    grad_bias = dy.sum(0).to(bias_dtype) if need_bias else dy.new_empty(0, dtype=bias_dtype)
    factor_grads = tuple(torch.zeros_like(t if need_factors else t[:0]) for t in (A, B, theta))
    need_G = need_weight or need_factors
    if need_G or need_x:
        x2, dx = None if x is None else x.reshape(-1, n), grad_x.view(-1, n)
        cols = block_length(m * dy.element_size(), n)
        workspace = dy.new_empty(m * cols)
        for start in range(0, n, cols):
            stop = min(start + cols, n)
            A_block, W_block = A[start:stop], None if weight is None else weight[:, start:stop]
            block = _block(workspace, weight, m, stop - start)
            if need_G:
                torch.mm(dy.t(), x2[:, start:stop], out=block)
            if need_weight:
                grad_weight[:, start:stop] = block
            if need_factors:
                torch.ops.snell.factor_grad.default(
                    block,
                    A_block,
                    B,
                    theta,
                    tau,
                    W_block if need_x else None,
                    block if need_x else None,
                    factor_grads[0][start:stop],
                    *factor_grads[1:],
                    kernel,
                    groups,
                    gate,
                )
            elif need_x:
                torch.ops.snell.merge_out.default(A_block, B, theta, tau, W_block, block, kernel, groups, gate)
            if need_x:
                torch.mm(dy, block, out=dx[:, start:stop])
    return grad_x, grad_weight, grad_bias, *factor_grads
