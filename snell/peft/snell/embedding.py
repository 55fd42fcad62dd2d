"""SNELL adapters of embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snell import functional
from snell.merging import Merged
from snell.peft.common import base
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.layer import AdaptedLinear
from snell.spec import Spec

__all__ = ["AdaptedEmbedding"]


class AdaptedEmbedding(AdaptedLinear):
    """An nn.Embedding with adapters. It is a linear layer of one-hot inputs, whose weight is stored [n, m].

    The vocabulary is n and the embedding's dimension m. A forward evaluates K for the ids that occur in the batch, once
    each; the threshold is that of the whole matrix. The row of ``padding_idx`` has no update and gives no gradient.
    Dropout has no effect, as with LoRA.

    Raises:
        ValueError: the embedding renormalises its weight in its forward pass (``max_norm``), or is split over
            processes.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        inner: Any = base.innermost(base_layer)
        if inner.max_norm is not None:
            raise ValueError(
                f"an Embedding with max_norm={inner.max_norm} cannot be adapted: its forward pass rewrites the frozen "
                "weight; leave it out with exclude_modules"
            )
        base.refuse_split(inner)
        super().__init__(base_layer, *args, **kwargs)

    def update_layer(self, adapter_name: str, spec: Spec, config: SnellConfig) -> None:
        """Add an adapter, or draw it anew."""
        super().update_layer(adapter_name, spec, config)
        self.snell_dropout[adapter_name] = nn.Identity()  # ids cannot be dropped

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        weight = base.fusable_weight(self.base_layer, self.fan_in_fan_out)
        if weight is None or args or kwargs:
            return super()._adapted(x, active, *args, **kwargs)
        return self._look_up(x, active, weight)

    def share(self, x: Tensor, name: str) -> Tensor:
        """The adapter's share of the output: ``dW[x]``, scaled as transformers' scaled embeddings are."""
        share, scale = self._look_up(x, [name], None), self._get_embed_scale()
        return share if scale is None else share * scale.to(share.dtype)

    def _look_up(self, x: Tensor, active: list[str], weight: Tensor | None) -> Tensor:
        """The rows of W0 + dW, or of dW without a weight ``[m, n]``, for the ids ``x [...]``."""
        inner: Any = self.get_base_layer()
        if torch.compiler.is_compiling() and not inner.scale_grad_by_freq:
            # How many different ids there are is unknown while the compiler traces.
            ids, places = x.flatten(), torch.arange(x.numel(), device=x.device).view_as(x)
        else:
            ids, places = x.unique(return_inverse=True)
        unchanged = None if weight is None else weight.index_select(1, ids)
        rows = unchanged
        for name in active:
            update = self._update(name)
            chosen = update.columns(ids)
            if inner.sparse:
                chosen = chosen._replace(A=F.embedding(ids, update.A, sparse=True))
            rows = functional.dense(chosen, None, rows, self.scaling[name])
        assert rows is not None
        if inner.padding_idx is not None:
            rows = torch.where(ids == inner.padding_idx, rows.new_zeros(()) if unchanged is None else unchanged, rows)
        return F.embedding(places, rows.T, scale_grad_by_freq=inner.scale_grad_by_freq)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense dW [vocabulary, dimension] of one adapter, less its start's; float32, or float64 as the weight."""
        delta, padding = super().get_delta_weight(adapter), self._padding()
        return delta if padding is None else delta.index_fill(0, torch.tensor(padding, device=delta.device), 0)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts linear layers alone."""
        return False

    def _padding(self) -> int | None:
        return self.get_base_layer().padding_idx  # type: ignore[return-value]

    def _change(self, name: str, weight: Tensor, safe_merge: bool) -> Any:
        change, padding = super()._change(name, weight, safe_merge), self._padding()
        return change if padding is None else _AllBut(padding, change, [])


class _AllBut(NamedTuple):
    """Merges the columns of an update on both sides of the one that is left out."""

    column: int
    whole: Merged
    sides: list[tuple[slice, Merged]]

    def put_in(self, weight: Tensor) -> None:
        for columns in self._around():
            self.sides.append((columns, self.whole._replace(update=self.whole.update.columns(columns), replaced=[])))
            self.sides[-1][1].put_in(weight[:, columns])

    def take_out(self, weight: Tensor) -> None:
        for columns, side in self.sides:
            side.take_out(weight[:, columns])

    def _around(self) -> Iterator[slice]:
        around = slice(0, self.column), slice(self.column + 1, self.whole.update.shape[1])
        return (columns for columns in around if columns.start < columns.stop)
