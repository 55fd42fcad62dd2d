"""The layer's forward and backward as library GEMMs on blocks of W0 + dW, for every backend.

Forward writes W0 + dW for a block of rows and multiplies. Backward does the following for each block of columns:
compute G, add the block's share of the factors' gradients and overwrite G with W0 + dW in the same pass, compute dX.
Each entry of dX comes from one GEMM and is rounded once. A backend may instead compute the factors' gradients from the
activations, without G. Nothing of size m*n is allocated; the workspace is bounded whatever the layer's size.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snell import backends, waves
from snell.update import Gradients, Update

#: Most bytes of workspace of a pass on a CPU. Blocks of this size are large enough for efficient GEMMs, and stay in the
#: last-level cache between the pass that writes them and the GEMM that reads them. :mod:`snell.waves` has a GPU's.
WORKSPACE_BYTES = 16 * 2**20

#: A block that is not the whole matrix has a multiple of this many rows or columns.
BLOCK_MULTIPLE = 64


class Needs(NamedTuple):
    """Which gradients a backward pass computes. Those of A, B and theta are always computed together."""

    x: bool
    weight: bool
    bias: bool
    factors: bool


def block_length(bytes_per_line: int, lines: int) -> int:
    """How many rows (or columns) of ``bytes_per_line`` one block holds."""
    length = WORKSPACE_BYTES // max(bytes_per_line, 1)
    if length >= lines:
        return max(lines, 1)
    return max(length - length % BLOCK_MULTIPLE, min(BLOCK_MULTIPLE, lines), 1)


def _as_matrix(t: Tensor, features: int) -> Tensor:
    """``[..., features]`` as ``[tokens, features]``; a view if possible."""
    return t if t.dim() == 2 else t.reshape(-1, features)


#: Rows or columns of each block, or of all blocks but the last.
Lengths = int | tuple[int, ...]


def row_lengths(tokens: int, m: int, n: int, element_size: int, device: torch.device) -> Lengths:
    """Rows of the blocks of W0 + dW in forward."""
    if device.type == "cuda":
        return waves.rows(tokens, m, n, element_size, waves.num_processors(device))
    return block_length(n * element_size, m)


def column_lengths(tokens: int, m: int, n: int, element_size: int, device: torch.device) -> Lengths:
    """Columns of the blocks of G and W0 + dW in backward."""
    if device.type == "cuda":
        return waves.columns(tokens, m, n, element_size, waves.num_processors(device))
    return block_length(m * element_size, n)


def longest(lengths: Lengths) -> int:
    """Lines of the longest block, for which the workspace is made."""
    return lengths if isinstance(lengths, int) else max(lengths)


def _blocks(lengths: Lengths, lines: int, *matrices: tuple[Tensor | Update | None, int]) -> Iterable[tuple[Any, ...]]:
    """Corresponding blocks of matrices and updates, of rows (dim 0) or columns (dim 1); None stays None."""
    if longest(lengths) >= lines:
        return (tuple(matrix for matrix, _ in matrices),)
    return zip(*(repeat(None) if t is None else t.split(lengths, dim) for t, dim in matrices), strict=False)


def _block(workspace: Tensor, weight: Tensor | None, rows: int, cols: int) -> Tensor:
    """A [rows, cols] block at the start of the workspace, with the weight's memory layout (Conv1D's is transposed)."""
    if workspace.numel() != rows * cols:
        workspace = workspace[: rows * cols]
    if weight is not None and weight.stride(1) != 1 and weight.stride(0) == 1:
        return workspace.view(cols, rows).t()
    return workspace.view(rows, cols)


def _adds_nothing(update: Update, weight: Tensor, like: Tensor) -> bool:
    """Whether W0 + dW is W0, because the update still is its start. Then one GEMM has the base layer's own bits.

    Asked of tensors in host memory alone: on a GPU the host would have to wait.
    """
    start = update.start
    if start is None or weight.dtype != like.dtype or like.device.type != "cpu":
        return False
    # tau first: it is one number, and training moves it.
    return all(map(torch.equal, (update.tau, *update[:3]), (start.tau, *start[:3])))


def merge(update: Update, weight: Tensor | None) -> Tensor:
    """The whole of dW or weight + dW."""
    out = torch.empty(update.shape, dtype=(update.A if weight is None else weight).dtype, device=update.A.device)
    backends.of(update.A).merge(update, weight, out)
    return out


def factor_gradients(G: Tensor, update: Update) -> Gradients:
    """dA, dB and dtheta from the whole of ``G [m, n]``."""
    grads = Gradients.zeros(update)
    backends.of(update.A).factor_grad(G, update, grads)
    return grads


def linear_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor:
    """``y = x (W0 + dW)^T + bias``, or ``x dW^T`` without a weight."""
    m, n = update.shape
    y = x.new_empty(*x.shape[:-1], m)
    if not y.numel():
        return y
    if weight is not None and _adds_nothing(update, weight, x):
        return torch.nn.functional.linear(x, weight, bias)
    x2, y2 = _as_matrix(x, n), _as_matrix(y, m)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    backend = backends.of(update.A)
    few = backend.few_tokens(x2, weight, bias, update)
    if few is not None:
        return few.view(y.shape)
    rows = row_lengths(x2.shape[0], m, n, x.element_size(), x.device)
    workspace = x.new_empty(longest(rows) * n)
    update = backend.prepare(update)
    for part, W_block, bias_block, y_block in _blocks(rows, m, (update, 0), (weight, 0), (bias, 0), (y2, 1)):
        block = _block(workspace, weight, part.B.shape[0], n)
        backend.merge(part, W_block, block)
        if bias_block is None:
            torch.mm(x2, block.t(), out=y_block)
        else:
            torch.addmm(bias_block, x2, block.t(), out=y_block)
    return y


def linear_backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor | None, update: Update, needs: Needs
) -> list[Tensor]:
    """The gradients that are needed, in this order: x, weight, bias, and then A, B, theta and smooth_max together."""
    m, n = update.shape
    dy = _as_matrix(grad_y, m)
    grad_x = dy.new_empty(*grad_y.shape[:-1], n) if needs.x else None
    grad_weight = torch.empty_like(weight) if needs.weight and weight is not None else None
    grad_bias = dy.sum(0, dtype=dy.dtype if weight is None else weight.dtype) if needs.bias else None
    grads = Gradients.zeros(update) if needs.factors else None
    backend = backends.of(update.A)
    x2 = None if x is None else _as_matrix(x, n)
    products = None
    if grads is not None and x2 is not None and not needs.weight:
        products = backend.factor_grad_of_tokens(dy, x2, update, grads)
    if grad_x is not None and weight is not None and _adds_nothing(update, weight, dy):
        torch.mm(dy, weight, out=_as_matrix(grad_x, n))
        needs = needs._replace(x=False)
    need_G = needs.weight or (grads is not None and products is None)
    if grads is not None or needs.weight or needs.x:
        cols = column_lengths(dy.shape[0], m, n, dy.element_size(), dy.device)
        update = backend.prepare(update)
        workspace = dy.new_empty(m * longest(cols))
        dx = None if grad_x is None or not needs.x else _as_matrix(grad_x, n)
        matrices = (weight, 1), (x2 if need_G else None, 1), (dx, 1), (grad_weight, 1)
        dA, dmax = (None, None) if grads is None else (grads.A, grads.smooth_max)
        lines = (dA, 0), (dmax, 0), (None if products is None else products.x, 0)
        for part, W_block, x_block, dx_block, dW_block, dA_block, dmax_block, products_block in _blocks(
            cols, n, (update, 1), *matrices, *lines
        ):
            block = _block(workspace, weight, m, part.A.shape[0])
            if need_G:
                torch.mm(dy.t(), x_block, out=block)
            if dW_block is not None:
                dW_block.copy_(block)
            if grads is not None:
                G = block if products is None else products.with_columns(products_block)
                merged = (W_block, block) if needs.x else (None, None)
                backend.factor_grad(G, part, grads.with_columns(dA_block, dmax_block), *merged)
            elif needs.x:
                backend.merge(part, W_block, block)
            if dx_block is not None:
                torch.mm(dy, block, out=dx_block)
    return [grad for grad in (grad_x, grad_weight, grad_bias, *(grads or ())) if grad is not None]
