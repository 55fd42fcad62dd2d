"""What a backend is: the block operations of an update on one kind of device.

:mod:`snell.reference` defines each operation. Arguments are checked above, in :mod:`snell.functional`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from snell.spec import Spec
from snell.update import Gradients, Parameters, Update

__all__ = ["Backend"]


class Backend(ABC):
    """Two operations every backend has, and abilities it may have; the defaults say that it has not.

    Attributes:
        name: as in ``backends.AVAILABLE``.
        dtypes: of the factors it serves. Others go to the backend that serves every device.
        remembers: whether :meth:`select` knows unchanged factors by itself, on the device.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    remembers = False

    @abstractmethod
    def merge(self, update: Update, weight: Tensor | None, out: Tensor) -> None:
        """Write dW, or weight + dW where a weight is given, into ``out [m, n]`` in its dtype.

        An entry whose dW is 0 keeps the weight's bits. Rows or columns of both matrices are contiguous.
        """

    @abstractmethod
    def factor_grad(
        self, G: Tensor, update: Update, grads: Gradients, weight: Tensor | None = None, merged: Tensor | None = None
    ) -> None:
        """Add the share of ``G [m, n]`` (dY^T X) to ``grads``; in the same pass write weight + dW into ``merged``.

        ``merged`` may be G itself.
        """

    def prepare(self, update: Update) -> Update:
        """The update with its factors laid out as the block operations read them: copied once a pass."""
        return update

    def select(self, A: Tensor, B: Tensor, theta: Tensor, spec: Spec, k: int) -> Tensor | None:
        """The k-th smallest \\|K\\|, from 1, of the whole matrix. None: count over blocks of :meth:`merge` instead."""
        return None

    def forget(self) -> None:
        """Forget thresholds that it remembers by itself."""
        return None

    def select_together(self, layers: Sequence[Parameters]) -> tuple[Tensor, Tensor] | None:
        """tau and a fingerprint of each layer's parameters, ``[layers]`` each, in launches that all layers share.

        All layers have one device, rank, kernel function and number of groups. None: no such ability.
        """
        return None

    def verify(self, A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, fingerprint: Tensor) -> Tensor:
        """tau if the parameters still have the fingerprint, else NaN; settled on the device, without asking the host.

        Backends that :meth:`select_together` have it.
        """
        raise NotImplementedError(f"backend {self.name} selects for one layer at a time")

    def few_tokens(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor | None:
        """``x (W0 + dW)^T + bias`` for ``x [tokens, n]``, without building W0 + dW. None: not for this input."""
        return None

    def factor_grad_of_tokens(
        self, grad_y: Tensor, x: Tensor, update: Update, grads: Gradients, *, always: bool = False
    ) -> bool:
        """Add the gradients straight from ``grad_y [T, m]`` and ``x [T, n]``, without G, where that is cheaper.

        Args:
            always: do it wherever possible, cheaper or not.

        Returns:
            Whether it did. Where not, the caller forms G and calls :meth:`factor_grad`.
        """
        return False
