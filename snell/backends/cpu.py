"""The native CPU backend: C++ kernels behind :mod:`snell.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from snell import native
from snell.backends.base import Backend
from snell.backends.layout import is_transposed, readable, row_major
from snell.spec import Spec
from snell.update import Activations, Gradients, Update

#: Up to this share of survivors, computing G for survivors only is cheaper than the GEMM for all of G in float32. It is
#: not in bfloat16, whose GEMM is several times faster.
FEW_SURVIVORS = 1 / 8

#: Multiply-adds of the GEMM from which it pays to estimate the survivors' share, which takes some ten microseconds.
WORTH_ASKING = 2**26
SAMPLES = 4096

#: Most tokens in a slab, and most bytes of its transposed activations. Each slab is one sweep over the entries.
SLAB_TOKENS = 4096
SLAB_BYTES = 16 * 2**20


def num_slabs(tokens: int, m: int, n: int, element_size: int) -> int:
    """Number of slabs of tokens in ``factor_grad_of_tokens``."""
    return -(-tokens // max(min(SLAB_TOKENS, SLAB_BYTES // ((m + n) * element_size)), 1))


class CpuBackend(Backend):
    """Tensors in host memory."""

    name = "cpu"

    def select(self, A: Tensor, B: Tensor, theta: Tensor, spec: Spec, k: int, smooth_max: Tensor | None) -> Tensor:
        return native.select(A.contiguous(), B.contiguous(), theta.contiguous(), spec, k, smooth_max)

    def sample(self, K: Update, first: int, out: Tensor) -> bool:
        native.sample(K, first, out)
        return True

    def within(self, K: Update, bounds: Tensor, out: Tensor) -> tuple[int, int]:
        return native.within(K, bounds, out)

    def smooth_max(self, A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Tensor:
        return native.smooth_max(A.contiguous(), B.contiguous(), theta.contiguous(), spec)

    def smooth_max_grad(self, grad: Tensor, update: Update, grads: Gradients) -> bool:
        native.smooth_max_grad(grad.contiguous(), self.prepare(update), grads)
        return True

    def prepare(self, update: Update) -> Update:
        A, B, theta = update[:3]
        # The smooth maxima are contiguous as they are computed.
        if A.is_contiguous() and B.is_contiguous() and theta.is_contiguous():
            return update
        return update._replace(A=A.contiguous(), B=B.contiguous(), theta=theta.contiguous())

    def merge(self, update: Update, weight: Tensor | None, out: Tensor) -> None:
        if is_transposed(out):
            return self.merge(update.transposed(), None if weight is None else weight.t(), out.t())
        native.merge(self.prepare(update), None if weight is None else row_major(weight), out)

    def factor_grad(
        self,
        G: Tensor | Activations,
        update: Update,
        grads: Gradients,
        weight: Tensor | None = None,
        merged: Tensor | None = None,
    ) -> None:
        if isinstance(G, Tensor):
            G = readable(G)
        lead = G if merged is None else merged
        if isinstance(lead, Tensor) and is_transposed(lead):
            others = (None if matrix is None else matrix.t() for matrix in (weight, merged))
            return self.factor_grad(
                G.t(), update.transposed(), Gradients(grads.B, grads.A, grads.theta, grads.smooth_max), *others
            )
        weight = None if weight is None else row_major(weight)
        G = row_major(G) if isinstance(G, Tensor) else G
        native.factor_grad(self.prepare(update), grads, G, weight, merged)

    def factor_grad_of_tokens(
        self, grad_y: Tensor, x: Tensor, update: Update, grads: Gradients, *, always: bool = False
    ) -> Activations | None:
        (tokens, m), n = grad_y.shape, x.shape[1]
        if update.spec.gate == "none" or grad_y.dtype != update.A.dtype:
            return None
        if not always and tokens * m * n < WORTH_ASKING:
            return None
        update = self.prepare(update)
        if not always and native.density(update, SAMPLES) > FEW_SURVIVORS:
            return None
        slabs = num_slabs(tokens, m, n, grad_y.element_size())
        # The gradients are linear in G, and G is a sum over tokens. Slabs bound the size of the transposed copies.
        *others, last = zip(grad_y.tensor_split(slabs), x.tensor_split(slabs), strict=True)
        for slab in others:
            native.factor_grad(update, grads, native.activations(*slab), None, None)
        return native.activations(*last)

    def edit(self, u: Tensor, scaling: Tensor, bias: Tensor) -> Tensor:
        z = torch.empty_like(u)
        native.edit(u, scaling, bias, z)
        return z

    def edit_backward(
        self, grad: Tensor, u: Tensor | None, scaling: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        likes = (grad, scaling, scaling)
        into = tuple(torch.empty_like(like) if need else None for like, need in zip(likes, needs, strict=True))
        native.edit_grad(grad, u, scaling, into)
        return into
