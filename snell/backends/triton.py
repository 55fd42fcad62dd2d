"""NVIDIA GPUs: the kernels of :mod:`snell.kernels`, launched on the tensors' device and current stream.

Float64 factors, which only gradient checks use, go to the blocked backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snell.backends.base import Backend
from snell.kernels import factor_grad, few_tokens, launch, merge, red, selection, split
from snell.kernels.fingerprint import verify
from snell.spec import Spec
from snell.update import Activations, Gradients, Parameters, Update


class TritonBackend(Backend):
    """CUDA tensors, or CPU tensors under Triton's interpreter."""

    name = "triton"
    dtypes = (torch.float32,)
    remembers = True

    def prepare(self, update: Update) -> Update:
        start = None if update.start is None else self.prepare(update.start)
        A, B, halves = launch.k_major(update.A), launch.k_major(update.B), update.halves
        if split.enabled() and halves is None:
            halves = split.split(A, B, update.spec)
        return update._replace(A=A, B=B, start=start, halves=halves)

    def merge(self, update: Update, weight: Tensor | None, out: Tensor) -> None:
        merge.merge(self.prepare(update), weight, out)

    def factor_grad(
        self,
        G: Tensor | Activations,
        update: Update,
        grads: Gradients,
        weight: Tensor | None = None,
        merged: Tensor | None = None,
    ) -> None:
        if isinstance(G, Activations):
            G = G.product()
        update = self.prepare(update)
        if merged is None or update.start is None:
            factor_grad.factor_grad(G, update, grads, weight, merged)
        else:  # beside the two products, the start's factors would spill
            factor_grad.factor_grad(G, update, grads)
            merge.merge(update, weight, merged)

    @torch.no_grad()
    def select(self, A: Tensor, B: Tensor, theta: Tensor, spec: Spec, k: int, smooth_max: Tensor | None) -> Tensor:
        taus, _ = selection.select_thresholds([(A, B, theta, spec)], smooth_max)
        return taus.squeeze(0)

    def forget(self) -> None:
        selection.forget()

    def select_together(self, layers: Sequence[Parameters]) -> tuple[Tensor, Tensor]:
        taus, fingerprints = selection.select_thresholds(layers)
        return taus, fingerprints.clone()  # a view of a workspace

    def verify(self, A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, fingerprint: Tensor) -> Tensor:
        return verify(A, B, theta, tau, fingerprint)

    def few_tokens(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor | None:
        if x.shape[0] > few_tokens.TOKENS or x.dtype == torch.float64:
            return None
        return few_tokens.linear_few(x, weight, bias, self.prepare(update))

    def edit(self, u: Tensor, scaling: Tensor, bias: Tensor) -> Tensor:
        return red.edit(u, scaling, bias)

    def edit_backward(
        self, grad: Tensor, u: Tensor | None, scaling: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        return red.edit_grad(grad, u, scaling, needs)
