"""The layer around a base layer that carries SNELL adapters. It holds tensors; :mod:`snell.functional` computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from snell import functional
from snell.initial import draw, draw_identity, draw_visible, relative_size
from snell.merging import Merged, row_blocks
from snell.peft.common import base, checkpoint
from snell.peft.common.factor import Factor
from snell.peft.snell.config import SnellConfig
from snell.precision import HALVES, factor_dtype, full
from snell.spec import Spec
from snell.update import Parameters, Update

__all__ = ["AdaptedLinear"]


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """``y = base(x) + sum over active adapters of x dW^T``; one GEMM where one adapter meets a float weight.

    By PEFT's convention "Linear" in the name of its class makes an adapted layer a target of "all-linear".

    Args:
        base_layer: an nn.Linear, a Conv1D, or an opaque layer with in_features and out_features.
        adapter_name, spec, config: the first adapter's name, make-up and settings.
        fan_in_fan_out: whether the base weight is stored [n, m].
        quantisation: what PEFT's quantisation backends need beside the base layer, to merge into it.

    Attributes:
        base_layer: the layer adapted.  in_features, out_features: n and m.
        snell_A: ``[n, r]``, snell_B: ``[m, r]``, snell_theta: ``[t]``, each the ``weight`` of a leaf module by
            adapter name; float32, or float64 where the base is (:meth:`round_factors` rounds them to the base's
            half precision). Scalars that are not trained are part of the configuration, not of the state.
        merged_adapters: names of the adapters whose update the base weight holds, in the order they went in.
        snell_spec: kernel function, gate, groups, rank and sparsity by adapter name.
    """

    adapter_layer_names = ("snell_A", "snell_B", "snell_theta")
    other_param_names = ("snell_dropout", "snell_spec", "snell_scale", "snell_constants")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        spec: Spec,
        config: SnellConfig,
        *,
        fan_in_fan_out: bool = False,
        quantisation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = fan_in_fan_out
        self.quantisation = quantisation or {}
        self.in_features, self.out_features = base.features(base_layer)
        self.snell_A, self.snell_B, self.snell_theta = (nn.ModuleDict() for _ in range(3))
        self.snell_dropout = nn.ModuleDict()
        self.snell_spec: dict[str, Spec] = {}
        self.snell_scale: dict[str, float] = {}
        self.snell_constants: dict[str, Tensor] = {}
        self._disable_adapters = False
        self._merged: dict[str, Merged | base.Quantised] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, spec, config)

    def update_layer(self, adapter_name: str, spec: Spec, config: SnellConfig) -> None:
        """Add an adapter, or draw it anew."""
        start = {True: draw, False: draw_visible, "identity": draw_identity}[config.init_weights]
        device, dtype = base.device_and_dtype(self.base_layer)
        options: dict[str, Any] = {"device": device, "dtype": factor_dtype(dtype)}
        A = torch.empty(self.in_features, spec.rank, **options)
        B = torch.empty(self.out_features, spec.rank, **options)
        theta = torch.empty(spec.num_theta, **options)
        start(A, B, theta, spec, config.scale)
        split = base.split(self.base_layer, self.fan_in_fan_out)
        if split is not None:
            split.agree(A, B)
        self.snell_A[adapter_name], self.snell_B[adapter_name] = Factor(A), Factor(B)
        for scalars in (self.snell_theta, self.snell_constants):
            if adapter_name in scalars:
                del scalars[adapter_name]
        if config.trains_theta and spec.num_theta:
            self.snell_theta[adapter_name] = Factor(theta)
        else:
            self.snell_constants[adapter_name] = theta
        self.snell_spec[adapter_name], self.snell_scale[adapter_name] = spec, config.scale
        self.snell_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., n] -> [..., m]``. ``adapter_names`` gives each sample its own adapter, ``__base__`` being none."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if torch.onnx.is_in_onnx_export() and not (self.merged or self.disable_adapters):
            raise RuntimeError(
                "a model with an unmerged SNELL adapter has no ONNX form: export what merge_and_unload() returns, or "
                "call merge_adapter() first"
            )
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.snell_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1 and not args and not kwargs and not self._drops(active[0]):
            weight = base.fusable_weight(self.base_layer, self.fan_in_fan_out)
            if weight is not None:
                return functional.linear(x, weight, base.bias(self.base_layer), self._update(active[0]))
        y = self.base_layer(x, *args, **kwargs)
        for name in active:
            share = self.share(self.snell_dropout[name](x), name)
            if share.shape != y.shape:
                raise ValueError(
                    f"the base layer answers {tuple(y.shape)} where its update is {tuple(share.shape)}: of tensor "
                    "parallelism, the default layouts of ColwiseParallel and RowwiseParallel are supported"
                )
            y = y + share.to(y.dtype)
        return y

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in dict.fromkeys(adapter_names):
            if name in self.snell_A:
                samples = [i for i, other in enumerate(adapter_names) if other == name]
                y = y.index_add(0, torch.tensor(samples, device=y.device), self.share(x[samples], name).to(y.dtype))
        return y

    def _drops(self, name: str) -> bool:
        return self.training and isinstance(self.snell_dropout[name], nn.Dropout)

    def share(self, x: Tensor, name: str) -> Tensor:
        """The adapter's share of the output, ``x dW^T``."""
        split = base.split(self.base_layer, self.fan_in_fan_out)
        if split is None:
            return functional.linear(x, None, None, self._update(name))
        return split.leave(functional.linear(split.enter(x), None, None, self._update(name)))

    def _update(self, name: str) -> Update:
        A, B, theta, spec = self._parameters_of(name)
        split = base.split(self.base_layer, self.fan_in_fan_out)
        return functional.update(A, B, theta, spec) if split is None else split.update(A, B, theta, spec)

    def _parameters_of(self, name: str) -> Parameters:
        theta = self.snell_theta[name]() if name in self.snell_theta else self.snell_constants[name]
        return full(self.snell_A[name]()), full(self.snell_B[name]()), full(theta), self.snell_spec[name]

    def snell_parameters(self) -> Iterator[Parameters]:
        """A, B, theta and the make-up of each adapter's update, for what works on all updates of a model."""
        return (self._parameters_of(name) for name in self.snell_A)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense dW of one adapter, laid out as the base weight is, in float32 or, where the base is, float64."""
        delta = functional.dense(self._update(adapter))
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of adapters into the base weight, in place.

        Until they are unmerged the layer keeps the weights that survivors replaced, (1 - s) * m * n numbers an
        adapter, so that unmerging gives the base weight back bit for bit.

        Args:
            safe_merge: look for NaN and infinity before the weight is touched.
            adapter_names: which adapters; None: the active ones.

        Raises:
            ValueError: ``safe_merge`` found a merged weight that is not finite.
            TypeError: the base layer is opaque, and PEFT cannot quantise it anew.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.snell_A:
                continue
            update = self._update(name)
            weight = base.float_weight(self.get_base_layer(), self.fan_in_fan_out)
            target = weight if weight is not None else base.dequantise(self)
            dense = (functional.dense(update, rows, target[rows]) for rows in row_blocks(update))
            if safe_merge and not all(rows.isfinite().all() for rows in dense):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            merged = Merged.of(update)
            record = merged if weight is not None else base.Quantised.of(self)
            try:
                self._merged[name] = record
                merged.put_in(target)
                if weight is None:
                    base.requantise(self, target)
            except BaseException:  # KeyboardInterrupt too: undo
                self._take_out(name, record)
                raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self._merged:
            name, record = next(reversed(self._merged.items()))
            try:
                self._take_out(name, record)
            except BaseException:  # KeyboardInterrupt too: finish
                self._take_out(name, record)
                raise

    def _take_out(self, name: str, record: Merged | base.Quantised) -> None:
        if isinstance(record, Merged):
            weight = base.float_weight(self.get_base_layer(), self.fan_in_fan_out)
            assert weight is not None  # it was when this was merged
            record.take_out(weight)
        else:
            record.put_back(self)
        self._merged.pop(name, None)

    def unmerged_weight(self) -> Tensor:
        """A copy of the float base weight without what is merged into it, laid out as it is."""
        base_layer: Any = self.get_base_layer()
        weight = base_layer.weight.detach().clone()
        for record in reversed(self._merged.values()):
            record.take_out(weight.T if self.fan_in_fan_out else weight)  # type: ignore[union-attr]
        return weight

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Names of the merged adapters, in the order they went in."""
        return list(self._merged)

    def round_factors(self, adapter_name: str) -> None:
        """Round an adapter's factors to the base weight's half precision, where it has one.

        The forward pass widens them again: who survives is decided in float32, among rounded factors.
        """
        dtype = base.device_and_dtype(self.base_layer)[1]
        if dtype in HALVES:
            for factor in self._factors(adapter_name):
                factor.weight.data = factor.weight.data.to(dtype)

    def relative_size(self, adapter_name: str) -> float:
        """About norm(dW) / norm(W0) at the start; 0 where that cannot be told (opaque, split or meta)."""
        weight = base.float_weight(self.get_base_layer(), self.fan_in_fan_out)
        A, B, theta, spec = self._parameters_of(adapter_name)
        if weight is None or A.is_meta or weight.shape != (self.out_features, self.in_features):
            return 0.0
        return relative_size(A, B, theta, spec, weight)

    def _factors(self, adapter_name: str) -> Iterator[Any]:
        dicts = (self.snell_A, self.snell_B, self.snell_theta)
        return (factors[adapter_name] for factors in dicts if adapter_name in factors)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would round the factors to the base's dtype; who survives is decided in float32.
        device = device or base.device_and_dtype(self.base_layer)[0]
        for factor in self._factors(adapter_name):
            if not factor.weight.is_meta:
                factor.weight.data = factor.weight.data.to(device)
        self._place_constants()

    def _place_constants(self) -> None:
        # Written anew rather than moved: what a model holds after .to_empty() is not what it held before.
        for name in self.snell_constants:
            theta = self.snell_spec[name].initial_theta(self.snell_scale[name])
            A = self._parameters_of(name)[0]
            self.snell_constants[name] = torch.tensor(theta, dtype=A.dtype, device=A.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        # Another device or dtype may decide survivors by other bits, so merged updates come out first.
        merged = list(self.merged_adapters)
        if merged:
            self.unmerge()
        super()._apply(fn, recurse)
        self._place_constants()
        if merged:
            self.merge(adapter_names=merged)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoint.modernise(self, state_dict, prefix)
        args[-1].extend(checkpoint.not_finite(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "snell." + super().__repr__()
