"""The layer around a base layer whose outputs are edited. It holds tensors; :mod:`snell.functional` computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snell import functional
from snell.peft.common import base
from snell.peft.common.base import local
from snell.peft.common.factor import Factor
from snell.peft.common.layer import TunerLayer
from snell.peft.red.config import RedConfig
from snell.precision import factor_dtype, full

if TYPE_CHECKING:
    from snell.distributed import Split

__all__ = ["EditedLinear"]

#: Rows of a weight that are merged at a time.
_ROWS = 1024


class EditedLinear(TunerLayer):
    """``z = s * base(x) + c``. Several active adapters edit one after another, in the order they are active.

    The base may be another tuner's layer (LoRA's, SNELL's): what it answers is edited.

    Args:
        base_layer: an nn.Linear, a Conv1D, an opaque layer with in_features and out_features, or another tuner's layer
            around one of these.
        adapter_name, config: the first adapter's name and settings.
        fan_in_fan_out: whether the base weight is stored [n, m].
        quantisation: what PEFT's quantisation backends need beside the base layer, to merge into it.

    Attributes:
        repr_scaling: s ``[m]``, repr_bias: c ``[m]``, each the ``weight`` of a leaf module by adapter name;
            float32, or float64 where the base is.
    """

    tuner = "RED"
    adapter_layer_names = ("repr_scaling", "repr_bias")
    other_param_names = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RedConfig,
        *,
        fan_in_fan_out: bool = False,
        quantisation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(base_layer, fan_in_fan_out=fan_in_fan_out, quantisation=quantisation)
        self.repr_scaling, self.repr_bias = nn.ModuleDict(), nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: RedConfig) -> None:
        """Add an adapter, or start it anew."""
        device, dtype = base.device_and_dtype(self.base_layer)
        options: dict[str, Any] = {"device": device, "dtype": factor_dtype(dtype)}
        scaling = torch.ones(self.out_features, **options)
        # Not +0, which would turn an output of -0 into +0: a fresh edit keeps every bit.
        bias = torch.full((self.out_features,), -0.0, **options)
        if not config.init_weights:
            nn.init.normal_(scaling, 1, 0.2)
            nn.init.normal_(bias, 0, 0.2)
        split = base.split(self.base_layer, self.fan_in_fan_out)
        if split is not None:
            split.agree(scaling, bias)
        self.repr_scaling[adapter_name], self.repr_bias[adapter_name] = Factor(scaling), Factor(bias)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        y, (scaling, bias) = self.base_layer(x, *args, **kwargs), self._edit(active)
        if y.shape != (*x.shape[:-1], len(scaling)):
            raise ValueError(
                f"the base layer answers {tuple(y.shape)} to {tuple(x.shape)} where the edit has {len(scaling)} "
                "outputs: of tensor parallelism, the default layouts of ColwiseParallel and RowwiseParallel work"
            )
        return functional.edit(y, scaling, bias)

    def _adapt_samples(self, y: Tensor, x: Tensor, samples: Tensor, name: str) -> Tensor:
        return y.index_copy(0, samples, functional.edit(y[samples], *self._edit([name])))

    def _edit(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """s and c of these adapters one after another, or this process's piece of them."""
        first, *others = ((full(self.repr_scaling[n]()), full(self.repr_bias[n]())) for n in names)
        scaling, bias = first
        for s, c in others:
            scaling, bias = s * scaling, s * bias + c
        split = base.split(self.base_layer, self.fan_in_fan_out)
        if split is not None:
            scaling, bias = split.rows(scaling, bias)
        return scaling, bias

    def _change(self, name: str, weight: Tensor, safe_merge: bool) -> _Merged:
        split = base.split(self.base_layer, self.fan_in_fan_out)
        change = _Merged(self.get_base_layer(), self._edit([name]), weight.dtype, split)
        if safe_merge and not change.is_finite(weight):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return change


class _Merged:
    """The record that takes an edit out of a base layer: the weight and the bias as they were.

    Scalings may be 0, so nothing can be divided out again. Rows are recorded before they are written.
    """

    def __init__(self, layer: nn.Module, edit: tuple[Tensor, Tensor], dtype: torch.dtype, split: Split | None) -> None:
        self.scaling, merged = (t.detach().clone() for t in edit)
        self.layer, self.bias = layer, base.bias(layer)
        self.replaced: list[Tensor] = []
        if self.bias is not None:
            merged, dtype = self.scaling * local(self.bias) + merged, self.bias.dtype
        merged = merged.to(dtype)
        if split is not None:
            merged = split.spread(merged, base.features(layer)[1], layer.weight)  # type: ignore[arg-type]
        # A parameter of its own: the old one is put back as it is.
        self.merged_bias = nn.Parameter(merged, requires_grad=False)

    def _blocks(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the weight, and the same rows of the merged weight in the scaling's dtype."""
        for rows, s in zip(weight.split(_ROWS), self.scaling.split(_ROWS), strict=True):
            yield rows, rows * s[:, None]

    def is_finite(self, weight: Tensor) -> bool:
        """Whether what would be written is, once it is rounded to the weight's dtype."""
        finite = (merged.to(weight.dtype).isfinite().all() for _, merged in self._blocks(weight))
        return bool(local(self.merged_bias).isfinite().all()) and all(finite)

    def put_in(self, weight: Tensor) -> None:
        """Scale the rows of ``weight [m, n]`` in place, each entry rounded once, and give the layer its bias."""
        for rows, merged in self._blocks(weight):
            self.replaced.append(rows.clone())
            rows.copy_(merged)
        self.layer.bias = self.merged_bias

    def take_out(self, weight: Tensor) -> None:
        """Restore ``weight [m, n]`` in place, and the bias."""
        for rows, replaced in zip(weight.split(_ROWS), self.replaced, strict=False):
            rows.copy_(replaced)
        self.layer.bias = self.bias  # type: ignore[assignment]
