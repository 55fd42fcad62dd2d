"""tau of a matrix whose pieces are on the processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from snell import backends
from snell.competition import memo
from snell.competition.thresholds import count
from snell.spec import Spec

__all__ = ["select_among"]


@torch.no_grad()
def select_among(
    group: dist.ProcessGroup,
    pieces: tuple[Tensor, Tensor],
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    spec: Spec,
    smooth_max: Tensor | None = None,
) -> Tensor:
    """tau of the whole matrix, on every process, with the same bits as if one process had selected it.

    Args:
        group: the processes with the pieces; all of them must call.
        pieces: the factors A and B of this process's piece.
        A, B, theta: ``[n, r]``, ``[m, r]`` and ``[t]`` of the whole matrix, equal on all processes.
        smooth_max: that of the piece's columns, over all rows, if the kernel function has a softmax.
    """
    if spec.sparsity == 0.0:
        return A.new_zeros(())
    A, B, theta = (t.detach().contiguous() for t in (A, B, theta))
    k = spec.num_zeroed(A.shape[0] * B.shape[0])

    def add(counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=group)
        return counts

    def select() -> Tensor:
        return count(backends.of(A), *pieces, theta, spec, k, smooth_max, add)

    if A.device.type != "cpu":
        return select()
    # Keyed by the whole factors, so that either all processes of the group find a threshold or none does.
    key = memo.fingerprint(A, B, theta), A.shape, B.shape, A.dtype, k, spec.kernel, spec.groups, group.group_name
    return memo.remember(key, select)
