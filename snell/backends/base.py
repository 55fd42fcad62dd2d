"""The interface of a backend: the block operations of an update on one type of device.

:mod:`snell.reference` defines each operation. Arguments are checked in :mod:`snell.functional`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from snell.spec import Spec
from snell.update import Activations, Gradients, Parameters, Update

__all__ = ["Backend"]


class Backend(ABC):
    """Every backend has ``merge`` and ``factor_grad``. The others are optional; their defaults mean "not supported", or
    compute in plain PyTorch (``edit``).

    Attributes:
        name: as in ``backends.AVAILABLE``.
        dtypes: dtypes of factors that it serves. Factors of other dtypes go to ``blocked``.
        remembers: whether :meth:`select` itself recognises unchanged factors, on the device.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    remembers = False

    @abstractmethod
    def merge(self, update: Update, weight: Tensor | None, out: Tensor) -> None:
        """Write dW, or weight + dW if a weight is given, into ``out [m, n]`` in its dtype.

        Where dW is 0, ``out`` gets the weight's bits. Rows or columns of both matrices are contiguous. An update and
        its start are subtracted in the factors' dtype, before anything is rounded: equal entries give a dW of 0.
        """

    @abstractmethod
    def factor_grad(
        self,
        G: Tensor | Activations,
        update: Update,
        grads: Gradients,
        weight: Tensor | None = None,
        merged: Tensor | None = None,
    ) -> None:
        """Add the gradients from ``G [m, n]`` (dY^T X) to ``grads``.

        The same pass writes weight + dW into ``merged``, if given. ``merged`` may be G itself. A start is constant: it
        changes ``merged`` alone.
        """

    def prepare(self, update: Update) -> Update:
        """The update with its factors in the layout that block operations read, so that a pass copies them once.

        A start's factors are contiguous, as they are drawn.
        """
        return update

    def select(
        self, A: Tensor, B: Tensor, theta: Tensor, spec: Spec, k: int, smooth_max: Tensor | None
    ) -> Tensor | None:
        """The k-th smallest \\|K\\| (k from 1) of the whole matrix. None: the caller counts in blocks."""
        return None

    def sample(self, K: Update, first: int, out: Tensor) -> bool:
        """Fill ``out`` with \\|K\\| of random entries, those that follow the first ``first``. False: not supported.

        The sample need not match K bit for bit.
        """
        return False

    def within(self, K: Update, bounds: Tensor, out: Tensor) -> tuple[int, int]:
        """How many \\|K\\| are below the bounds ``[2]`` and how many within; ``out`` gets these if it has the room.

        Required of backends that support :meth:`sample`.
        """
        raise NotImplementedError(f"backend {self.name} does not gather entries")

    def smooth_max(self, A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Tensor | None:
        """The smooth maximum ``[n]`` of each column of the K under a softmax. None: the caller finds it in blocks."""
        return None

    def smooth_max_grad(self, grad: Tensor, update: Update, grads: Gradients) -> bool:
        """Add to the gradients of A, B and gamma from ``grad [n]``, that of the update's smooth maxima.

        False: the caller does it in blocks.
        """
        return False

    def forget(self) -> None:
        """Forget the thresholds that the backend remembers."""
        return None

    def select_together(self, layers: Sequence[Parameters]) -> tuple[Tensor, Tensor] | None:
        """tau and a fingerprint of the parameters of each layer, each ``[layers]``, in shared launches.

        All layers have the same device, rank, kernel function without a softmax, and number of groups. None: not
        supported.
        """
        return None

    def verify(self, A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, fingerprint: Tensor) -> Tensor:
        """tau if the parameters still have the fingerprint, else NaN. Decided on the device, without a synchronisation.

        Required of backends that support :meth:`select_together`.
        """
        raise NotImplementedError(f"backend {self.name} selects for one layer at a time")

    def few_tokens(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor | None:
        """``x (W0 + dW)^T + bias`` for ``x [tokens, n]`` without writing W0 + dW. None: not for this input."""
        return None

    def factor_grad_of_tokens(
        self, grad_y: Tensor, x: Tensor, update: Update, grads: Gradients, *, always: bool = False
    ) -> Activations | None:
        """Compute G for survivors only, from ``grad_y [T, m]`` and ``x [T, n]``, if that costs less than the GEMM.

        Args:
            always: do it whenever possible, even if it costs more.

        Returns:
            The activations from which :meth:`factor_grad` is to compute G. The gradients from tokens that they leave
            out have been added to ``grads``. None: the caller computes G.
        """
        return None

    def edit(self, u: Tensor, scaling: Tensor, bias: Tensor) -> Tensor:
        """``scaling * u + bias`` in u's dtype, rounded to it once. ``u [T, m]``; all contiguous.

        The vectors ``[m]`` have a factor's dtype, in which both this and :meth:`edit_backward` compute.
        """
        return torch.addcmul(bias, u.to(scaling.dtype), scaling).to(u.dtype)

    def edit_backward(
        self, grad: Tensor, u: Tensor | None, scaling: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of u, scaling and bias that are needed, from ``grad [T, m]``; the same bits every time.

        ``u`` may be missing if the scaling's is not.
        """
        wide = grad.to(scaling.dtype)
        return (
            (wide * scaling).to(grad.dtype) if needs[0] else None,
            (wide * u).sum(0) if u is not None and needs[1] else None,
            wide.sum(0) if needs[2] else None,
        )
