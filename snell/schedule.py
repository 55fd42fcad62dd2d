"""The layer as blocks of library GEMMs around the backend's block operations, written once.

Forward builds W0 + dW a block of rows at a time and multiplies. Backward goes by blocks of columns, so
that every entry of dX comes out of one GEMM and is rounded once: G of the block first, then one pass
that turns G into factor gradients and leaves W0 + dW of the same block, then dX. A backend may take the
factors' gradients straight from the activations instead, without G. Nothing of size m*n is allocated:
the workspace is bounded whatever the layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Bytes of workspace a pass may hold. Blocks of this size lose nothing to the GEMM's edges and, on a CPU,
#: stay in the last-level cache between the pass that writes them and the GEMM that reads them.
WORKSPACE_BYTES = 16 * 2**20

#: The same on a GPU: more, as one block's GEMM has to fill every multiprocessor, but still within the L2 cache (40 MiB
#: and up), and, with the kernels' own 8 MiB, within 32 MiB.
GPU_WORKSPACE_BYTES = 24 * 2**20

#: Blocks are multiples of this many rows or columns where they are not the whole.
BLOCK_MULTIPLE = 64


#: The backend of each device type; ``""`` serves the others. A pass calls its block operations as functions: the
#: dispatcher's round trip for each block would cost a small layer more than its work.
BACKENDS: dict[str, ModuleType] = {}


def backend_of(device: torch.device) -> ModuleType:
    return BACKENDS.get(device.type) or BACKENDS[""]


def block_length(bytes_per_line: int, lines: int, device_type: str = "cpu") -> int:
    """How many rows (or columns) of ``bytes_per_line`` one block holds."""
    limit = GPU_WORKSPACE_BYTES if device_type == "cuda" else WORKSPACE_BYTES
    length = limit // max(bytes_per_line, 1)
    if length >= lines:
        return max(lines, 1)
    return max(length - length % BLOCK_MULTIPLE, min(BLOCK_MULTIPLE, lines), 1)


def _laid_out(backend: ModuleType, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors as the backend's block operations like them: copied once a pass, not once a block."""
    return backend.laid_out(A, B) if hasattr(backend, "laid_out") else (A, B)


def _as_matrix(t: Tensor, features: int) -> Tensor:
    """``[..., features]`` as ``[tokens, features]``; a view where there is one."""
    return t if t.dim() == 2 else t.reshape(-1, features)


def _blocks(length: int, lines: int, *matrices: tuple[Tensor | None, int]) -> Iterable[tuple[Any, ...]]:
    """The matrices in blocks of ``length`` rows (dim 0) or columns (dim 1), side by side; None stays None."""
    if length >= lines:
        return (tuple(matrix for matrix, _ in matrices),)
    return zip(*(repeat(None) if t is None else t.split(length, dim) for t, dim in matrices), strict=False)


def _block(workspace: Tensor, weight: Tensor | None, rows: int, cols: int) -> Tensor:
    """A [rows, cols] block at the head of the workspace, laid out as the weight is (Conv1D's is transposed)."""
    if workspace.numel() != rows * cols:
        workspace = workspace[: rows * cols]
    if weight is not None and weight.stride(1) != 1 and weight.stride(0) == 1:
        return workspace.view(cols, rows).t()
    return workspace.view(rows, cols)


def _zeros(t: Tensor) -> Tensor:
    """Where a backend adds the gradient of a factor: contiguous, however the factor itself lies."""
    return torch.zeros_like(t, memory_format=torch.contiguous_format)


def merge(
    A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, weight: Tensor | None, kernel: str, groups: int, gate: str
) -> Tensor:
    """``snell::merge``."""
    out = torch.empty(B.shape[0], A.shape[0], dtype=(A if weight is None else weight).dtype, device=A.device)
    backend_of(A.device).merge_out(A, B, theta, tau, weight, out, kernel, groups, gate)
    return out


def factor_gradients(
    G: Tensor, A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, kernel: str, groups: int, gate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``snell::merge_backward``: dA, dB and dtheta from the whole of ``G [m, n]``."""
    grads = _zeros(A), _zeros(B), _zeros(theta)
    backend_of(A.device).factor_grad(G, A, B, theta, tau, None, None, *grads, kernel, groups, gate)
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
    x2, y2 = _as_matrix(x, n), _as_matrix(y, m)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    backend = backend_of(x.device)
    if hasattr(backend, "linear_few") and backend.serves_few(x2, A):
        return backend.linear_few(x2, weight, bias, A, B, theta, tau, kernel, groups, gate).view(y.shape)
    rows = block_length(n * x.element_size(), m, x.device.type)
    workspace = x.new_empty(rows * n)
    A, B = _laid_out(backend, A, B)
    for B_block, W_block, bias_block, y_block in _blocks(rows, m, (B, 0), (weight, 0), (bias, 0), (y2, 1)):
        block = _block(workspace, weight, B_block.shape[0], n)
        backend.merge_out(A, B_block, theta, tau, W_block, block, kernel, groups, gate)
        if bias_block is None:
            torch.mm(x2, block.t(), out=y_block)
        else:
            torch.addmm(bias_block, x2, block.t(), out=y_block)
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
) -> list[Tensor]:
    """``snell::linear_backward``: the gradients that are needed, of x, weight, bias and (all three) A, B, theta."""
    m, n = B.shape[0], A.shape[0]
    dy = _as_matrix(grad_y, m)
    grad_x = dy.new_empty(*grad_y.shape[:-1], n) if need_x else None
    grad_weight = torch.empty_like(weight) if need_weight and weight is not None else None
    grad_bias = dy.sum(0, dtype=dy.dtype if weight is None else weight.dtype) if need_bias else None
    factor_grads = [_zeros(t) for t in (A, B, theta)] if need_factors else [None] * 3
    backend = backend_of(dy.device)
    x2 = None if x is None else _as_matrix(x, n)
    if need_factors and not need_weight and hasattr(backend, "factor_grad_of_tokens"):
        # A backend that can may take the factors' gradients straight from the activations, without G.
        update = (A, B, theta, tau, *factor_grads, kernel, groups, gate)
        need_factors = not backend.factor_grad_of_tokens(dy, x2, *update)
    need_G = need_weight or need_factors
    if need_G or need_x:
        cols = block_length(m * dy.element_size(), n, dy.device.type)
        A, B = _laid_out(backend, A, B)
        workspace = dy.new_empty(m * cols)
        dx = None if grad_x is None else _as_matrix(grad_x, n)
        dA = factor_grads[0] if need_factors else None
        for A_block, W_block, x_block, dx_block, dW_block, dA_block in _blocks(
            cols, n, (A, 0), (weight, 1), (x2 if need_G else None, 1), (dx, 1), (grad_weight, 1), (dA, 0)
        ):
            block = _block(workspace, weight, m, A_block.shape[0])
            if need_G:
                torch.mm(dy.t(), x_block, out=block)
            if dW_block is not None:
                dW_block.copy_(block)
            if dA_block is not None:
                merged = (W_block, block) if need_x else (None, None)
                grads = (dA_block, *factor_grads[1:])
                backend.factor_grad(block, A_block, B, theta, tau, *merged, *grads, kernel, groups, gate)
            elif need_x:
                backend.merge_out(A_block, B, theta, tau, W_block, block, kernel, groups, gate)
            if dx_block is not None:
                torch.mm(dy, block, out=dx_block)
    return [grad for grad in (grad_x, grad_weight, grad_bias, *factor_grads) if grad is not None]
