"""tau of a matrix whose pieces lie with the processes of a group."""

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
    group: dist.ProcessGroup, pieces: tuple[Tensor, Tensor], A: Tensor, B: Tensor, theta: Tensor, spec: Spec
) -> Tensor:
    """tau of the whole matrix, on every process: the bits that one process alone would find.

    Args:
        group: the processes that hold the pieces; all of them must call.
        pieces: the factors of this process's piece: those of its columns and of its rows.
        A, B, theta: ``[n, r]``, ``[m, r]`` and ``[t]`` of the whole matrix, equal on all processes.
    """
    if spec.sparsity == 0.0:
        return A.new_zeros(())
    A, B, theta = (t.detach().contiguous() for t in (A, B, theta))
    k = spec.num_zeroed(A.shape[0] * B.shape[0])

    def add(counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=group)
        return counts

    def select() -> Tensor:
        return count(backends.of(A), *pieces, theta, spec, k, add)

    if A.device.type != "cpu":
        return select()
    # By the whole factors, not by the piece: either all processes of the group remember, or none does.
    key = memo.fingerprint(A, B, theta), A.shape, B.shape, A.dtype, k, spec.kernel, spec.groups, group.group_name
    return memo.remember(key, select)
