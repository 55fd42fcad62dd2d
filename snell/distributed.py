"""Tensor parallelism: one update over several processes.

The weight is split over a process group, by rows (``ColwiseParallel``) or by columns (``RowwiseParallel``). The
threshold is still that of the whole matrix. Every process holds the whole factors, which are small, and builds its own
piece of dW. The counts of a selection, the factors' gradients and, if columns are split, the outputs are summed over
the processes. Inputs and outputs have the default layouts of those two styles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from snell import softmax
from snell.competition.processes import select_among
from snell.kernel_functions import smooth_max
from snell.spec import Spec
from snell.update import Update

__all__ = ["Split"]


class Split(NamedTuple):
    """Which rows (axis 0) or columns (axis 1) of a weight ``[m, n]`` this process of a group holds."""

    group: dist.ProcessGroup
    axis: int
    held: slice

    @classmethod
    def of(cls, weight: Tensor) -> Split | None:
        """How a DTensor is split; None for an ordinary tensor and for a DTensor that is not split.

        Raises:
            ValueError: it is not split over the rows or columns of a single group.
        """
        if not isinstance(weight, DTensor):
            return None
        mesh, placements = weight.device_mesh, weight.placements
        if all(placement.is_replicate() for placement in placements):
            return None
        if mesh.ndim != 1 or not placements[0].is_shard():
            raise ValueError(f"weight must be split over the rows or columns of one mesh dimension; got {placements}")
        axis = placements[0].dim % weight.dim()  # type: ignore[attr-defined]
        length = -(-weight.shape[axis] // mesh.size())  # as torch.chunk cuts
        start = min(length * mesh.get_local_rank(), weight.shape[axis])
        return cls(mesh.get_group(), axis, slice(start, min(start + length, weight.shape[axis])))

    @property
    def T(self) -> Split:
        """The split of the transposed weight."""
        return self._replace(axis=1 - self.axis)

    def update(self, A: Tensor, B: Tensor, theta: Tensor, spec: Spec, start: Update | None = None) -> Update:
        """This process's piece of the update of whole factors and its start, with the threshold of the whole matrix.

        Differentiable: the factors' gradients are summed over all pieces.
        """
        whole = A, B, theta
        A, B, theta = _SumGradients.apply(self.group, A, B, theta)
        pieces = self._pieces(A, B)
        maxima = softmax.smooth_max(*pieces, theta, spec)
        if maxima is not None and self.axis == 0:
            # Of each process's rows. Their smooth maximum, in turn, is that of all rows; the last may have no rows.
            count = -(-len(B) // -(-len(B) // self.group.size()))
            maxima = smooth_max(_Gather.apply(self.group, maxima)[:count], theta[-1])
        constants = None if maxima is None else maxima.detach()
        tau = select_among(self.group, (pieces[0].detach(), pieces[1].detach()), *whole, spec, constants)
        if start is not None:
            start = start.columns(self.held) if self.axis else start.rows(self.held)
        return Update(*pieces, theta, tau, spec.applied, start, maxima)

    def _pieces(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return (A, B[self.held]) if self.axis == 0 else (A[self.held], B)

    def rows(self, *vectors: Tensor) -> list[Tensor]:
        """This process's rows of whole vectors ``[m]``; all of them if columns are split, since outputs are whole then.

        Differentiable: if rows are split, the vectors' gradients are summed over the pieces.
        """
        if self.axis == 1:
            return list(vectors)
        return [vector[self.held] for vector in _SumGradients.apply(self.group, *vectors)]

    def spread(self, piece: Tensor, length: int, weight: DTensor) -> DTensor:
        """The vector ``[length]`` of which each process has its rows, laid out as a bias of ``weight`` is."""
        placement = Shard(0) if self.axis == 0 else Replicate()
        return DTensor.from_local(piece, weight.device_mesh, [placement], shape=torch.Size([length]), stride=(1,))

    def enter(self, x: Tensor) -> Tensor:
        """The layer's input. If rows are split, its gradient is summed over the pieces."""
        return _SumGradients.apply(self.group, x)[0] if self.axis == 0 else x

    def leave(self, y: Tensor) -> Tensor:
        """The layer's output. If columns are split, it is summed over the pieces."""
        return _Sum.apply(self.group, y) if self.axis == 1 else y

    @torch.no_grad()
    def agree(self, *tensors: Tensor) -> None:
        """Copy the tensors of the group's first process to all others."""
        for tensor in tensors:
            dist.broadcast(tensor, group=self.group, group_src=0)


class _SumGradients(torch.autograd.Function):
    """The identity; gradients are summed over the group in one all-reduce."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = [grad for grad, need in zip(grads, ctx.needs_input_grad[1:], strict=True) if need]
        flat = torch.cat([grad.reshape(-1) for grad in needed])
        dist.all_reduce(flat, group=ctx.group)
        sums = iter(flat.split([grad.numel() for grad in needed]))
        return None, *(
            next(sums).view_as(grad) if need else None
            for grad, need in zip(grads, ctx.needs_input_grad[1:], strict=True)
        )


class _Gather(torch.autograd.Function):
    """Every process's tensor, stacked. Gradients are summed over the group."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return None, grad[ctx.group.rank()]


class _Sum(torch.autograd.Function):
    """The sum over the group. Its gradient needs no exchange, because every process has it."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, y: Tensor) -> Tensor:
        y = y.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
