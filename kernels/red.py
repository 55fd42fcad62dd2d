"""The edit of a layer's outputs, ``z = scaling * u + bias``, and its gradients in one reading of ``grad`` and ``u``.

Forward: a program owns one [BLOCK_M, BLOCK_N] tile. Backward: a program owns BLOCK_N columns of a strip of rows; it
writes the gradient of u and leaves its sums of ``grad * u`` and ``grad`` as shares, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell import waves
from snell.kernels import launch
from snell.kernels.merge import tile_indices, tile_pointers
from snell.kernels.shares import add_all_shares

#: Programs a multiprocessor gets in backward, so that enough reads are in flight.
PROGRAMS = 8


@triton.jit
def edit_kernel(
    u_ptr, scaling_ptr, bias_ptr, z_ptr, tokens, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    rows, cols, row_mask, col_mask = tile_indices(tl.program_id(0), tokens, m, BLOCK_M, BLOCK_N)
    mask = row_mask & col_mask
    scaling, bias = tl.load(scaling_ptr + cols, col_mask), tl.load(bias_ptr + cols, col_mask)
    u = tl.load(tile_pointers(u_ptr, rows, cols, m, 1), mask).to(tl.float32)
    z = u * scaling + bias
    tl.store(tile_pointers(z_ptr, rows, cols, m, 1), z.to(z_ptr.dtype.element_ty), mask)


@triton.jit
def edit_grad_kernel(
    grad_ptr,
    u_ptr,
    scaling_ptr,
    grad_u_ptr,
    share_scaling_ptr,
    share_bias_ptr,
    tokens,
    m,
    HAS_U: tl.constexpr,
    NEEDS_U: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Shares ``[programs of axis 1, m]`` in float32; axis 0 goes over columns, axis 1 over strips of rows."""
    cols = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    col_mask = cols < m
    scaling = tl.load(scaling_ptr + cols, col_mask)
    sum_scaling, sum_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(tokens, BLOCK_M), tl.num_programs(1)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        mask = (rows < tokens) & col_mask
        grad = tl.load(tile_pointers(grad_ptr, rows, cols, m, 1), mask, 0.0).to(tl.float32)
        if HAS_U:
            sum_scaling += grad * tl.load(tile_pointers(u_ptr, rows, cols, m, 1), mask, 0.0).to(tl.float32)
        sum_bias += grad
        if NEEDS_U:
            out = (grad * scaling).to(grad_u_ptr.dtype.element_ty)
            tl.store(tile_pointers(grad_u_ptr, rows, cols, m, 1), out, mask)
    share = tl.program_id(1).to(tl.int64) * m + cols
    tl.store(share_scaling_ptr + share, tl.sum(sum_scaling, 0)[None, :], col_mask)
    tl.store(share_bias_ptr + share, tl.sum(sum_bias, 0)[None, :], col_mask)


def edit(u: Tensor, scaling: Tensor, bias: Tensor) -> Tensor:
    """``scaling * u + bias`` for ``u [tokens, m]``; all contiguous, the vectors float32."""
    (tokens, m), z, row = u.shape, torch.empty_like(u), launch.row("edit", u)
    grid, blocks = launch.tiles(tokens, m, row), {"BLOCK_M": row.block_m, "BLOCK_N": row.block_n}
    if tokens:
        launch.run(edit_kernel, grid, (u, scaling, bias, z, tokens, m), row, **blocks)
    return z


def edit_grad(
    grad: Tensor, u: Tensor | None, scaling: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of u, scaling and bias that are needed; all contiguous."""
    (tokens, m), row = grad.shape, launch.row("edit_grad", grad)
    across, tiles = -(-m // row.block_n), -(-tokens // row.block_m)
    strips = max(1, min(tiles, -(-PROGRAMS * waves.num_processors(grad.device) // across)))
    grad_u = torch.empty_like(grad) if needs[0] else None
    shares = scaling.new_empty(2, strips, m)
    launch.run(
        edit_grad_kernel,
        (across, strips),
        (grad, grad if u is None else u, scaling, grad if grad_u is None else grad_u, *shares, tokens, m),
        row,
        HAS_U=u is not None,
        NEEDS_U=grad_u is not None,
        BLOCK_M=row.block_m,
        BLOCK_N=row.block_n,
    )
    # Two tensors: results of an operation must not share memory.
    grad_scaling, grad_bias = torch.zeros_like(scaling), torch.zeros_like(scaling)
    add_all_shares((*shares, shares[0, 0, :0]), (grad_scaling, grad_bias, grad_bias[:0]), strips, strips)
    return grad_u, grad_scaling if needs[1] else None, grad_bias if needs[2] else None
