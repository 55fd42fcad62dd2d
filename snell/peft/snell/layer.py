"""The layer around a base layer that carries SNELL adapters. It holds tensors; :mod:`snell.functional` computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from snell import functional
from snell.initial import draw, draw_identity
from snell.merging import Merged, merge_into, row_blocks
from snell.peft.common import base, checkpoint
from snell.peft.snell.config import SnellConfig
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
        snell_A: ``[n, r]``, snell_B: ``[m, r]``, snell_theta: ``[t]`` by adapter name; float32, or float64
            where the base is. Scalars that are not trained are part of the configuration, not of the state.
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
        self.snell_A, self.snell_B, self.snell_theta = (nn.ParameterDict() for _ in range(3))
        self.snell_dropout = nn.ModuleDict()
        self.snell_spec: dict[str, Spec] = {}
        self.snell_scale: dict[str, float] = {}
        self.snell_constants: dict[str, Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged: list[Merged | base.Quantised] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, spec, config)

    def update_layer(self, adapter_name: str, spec: Spec, config: SnellConfig) -> None:
        """Add an adapter, or draw it anew."""
        start = {True: draw, False: _draw_visible, "identity": draw_identity}[config.init_weights]
        device, dtype = base.device_and_dtype(self.base_layer)
        options: dict[str, Any] = {
            "device": device,
            "dtype": torch.float64 if dtype == torch.float64 else torch.float32,
        }
        A = torch.empty(self.in_features, spec.rank, **options)
        B = torch.empty(self.out_features, spec.rank, **options)
        theta = torch.empty(spec.num_theta, **options)
        start(A, B, theta, spec, config.scale)
        split = base.split(self.base_layer, self.fan_in_fan_out)
        if split is not None:
            split.agree(A, B)
        self.snell_A[adapter_name], self.snell_B[adapter_name] = nn.Parameter(A), nn.Parameter(B)
        for scalars in (self.snell_theta, self.snell_constants):
            if adapter_name in scalars:
                del scalars[adapter_name]
        if config.trains_theta and spec.num_theta:
            self.snell_theta[adapter_name] = nn.Parameter(theta)
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
            share = self._share(self.snell_dropout[name](x), name)
            if share.shape != y.shape:
                raise ValueError(
                    f"the base layer answers {tuple(y.shape)} where its update is {tuple(share.shape)}: of tensor "
                    "parallelism, the default layouts of ColwiseParallel and RowwiseParallel are supported"
                )
            y = y + share.to(y.dtype)
        return y

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names must name one adapter a sample, {len(x)}; got {len(adapter_names)}")
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first")
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in dict.fromkeys(adapter_names):
            if name in self.snell_A:
                samples = [i for i, other in enumerate(adapter_names) if other == name]
                y = y.index_add(0, torch.tensor(samples, device=y.device), self._share(x[samples], name).to(y.dtype))
        return y

    def _drops(self, name: str) -> bool:
        return self.training and isinstance(self.snell_dropout[name], nn.Dropout)

    def _share(self, x: Tensor, name: str) -> Tensor:
        """The adapter's share of the output, ``x dW^T``."""
        split = base.split(self.base_layer, self.fan_in_fan_out)
        if split is None:
            return functional.linear(x, None, None, self._update(name))
        return split.leave(functional.linear(split.enter(x), None, None, self._update(name)))

    def _update(self, name: str) -> Update:
        A, B, theta, spec = self._parameters_of(name)
        A, B, theta = _full(A), _full(B), _full(theta)
        split = base.split(self.base_layer, self.fan_in_fan_out)
        return functional.update(A, B, theta, spec) if split is None else split.update(A, B, theta, spec)

    def _parameters_of(self, name: str) -> Parameters:
        theta = (self.snell_theta if name in self.snell_theta else self.snell_constants)[name]
        return self.snell_A[name], self.snell_B[name], theta, self.snell_spec[name]

    def snell_parameters(self) -> Iterator[Parameters]:
        """A, B, theta and the make-up of each adapter's update, for what works on all updates of a model."""
        return (self._parameters_of(name) for name in self.snell_A)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense dW of one adapter, laid out as the base weight is, in the factors' dtype."""
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
            merged = merge_into(target, update)
            self._merged.append(merged if weight is not None else base.requantise(self, target))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            merged = self._merged.pop()
            if isinstance(merged, Merged):
                weight = base.float_weight(self.get_base_layer(), self.fan_in_fan_out)
                assert weight is not None  # it was when this was merged
                merged.take_out(weight)
            else:
                merged.put_back(self)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would round the factors to the base's dtype; who survives is decided in float32.
        device = device or base.device_and_dtype(self.base_layer)[0]
        for parameters in (self.snell_A, self.snell_B, self.snell_theta):
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)
        self._place_constants()

    def _place_constants(self) -> None:
        # Written anew rather than moved: what a model holds after .to_empty() is not what it held before.
        for name in self.snell_constants:
            theta = self.snell_spec[name].initial_theta(self.snell_scale[name])
            A = self.snell_A[name]
            self.snell_constants[name] = torch.tensor(theta, dtype=_full(A).dtype, device=A.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        # Another device or dtype may decide survivors by other bits, so merged updates come out first.
        merged = list(self.merged_adapters)
        if merged:
            self.unmerge()
        factors = {id(p) for d in (self.snell_A, self.snell_B, self.snell_theta) for p in d.values()}
        super()._apply(lambda t: _keep_precision(t, fn(t)) if id(t) in factors else fn(t), recurse)
        self._place_constants()
        if merged:
            self.merge(adapter_names=merged)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        args[-1].extend(checkpoint.not_finite(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "snell." + super().__repr__()


def _draw_visible(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, scale: float) -> None:
    draw(A, B, theta, spec, scale)
    for factor in (A, B):
        nn.init.normal_(factor)


def _full(factor: Tensor) -> Tensor:
    # Mixed-precision sharding hands the factors over rounded; everything after that stays in float32.
    return factor.float() if factor.dtype in (torch.bfloat16, torch.float16) else factor


def _keep_precision(before: Tensor, after: Tensor) -> Tensor:
    """A half-precision model keeps the factors in full: only their device follows ``.to(dtype)``."""
    return before.to(after.device) if after.dtype in (torch.bfloat16, torch.float16) else after
