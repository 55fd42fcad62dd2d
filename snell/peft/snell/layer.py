"""The layer around a base layer that carries SNELL adapters. It holds tensors; :mod:`snell.functional` computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snell import functional
from snell.initial import Start, draw, draw_identity, draw_visible, relative_size
from snell.merging import Merged, row_blocks
from snell.peft.common import base
from snell.peft.common.factor import Factor
from snell.peft.common.layer import TunerLayer
from snell.peft.snell.competition import Competition
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.scaling import Scaled
from snell.precision import HALVES, factor_dtype, full
from snell.spec import Spec
from snell.update import Parameters, Update

__all__ = ["AdaptedLinear"]


class AdaptedLinear(Scaled, TunerLayer):
    """``y = base(x) + sum over active adapters of scaling x dW^T``; one GEMM where one adapter meets a float weight.

    By PEFT's convention "Linear" in the name of its class makes an adapted layer a target of "all-linear".

    Args:
        base_layer: an nn.Linear, a Conv1D, or an opaque layer with in_features and out_features.
        adapter_name, settings: the first adapter's name, and what :meth:`update_layer` takes after it.
        fan_in_fan_out: whether the base weight is stored [n, m].
        quantisation: what PEFT's quantisation backends need beside the base layer, to merge into it.

    Attributes:
        base_layer: the layer adapted.  in_features, out_features: n and m.
        snell_A: ``[n, r]``, snell_B: ``[m, r]``, snell_theta: ``[t]``, each the ``weight`` of a leaf module by
            adapter name; float32, or float64 where the base is (:meth:`round_factors` rounds them to the base's
            half precision). Scalars that are not trained are part of the configuration, not of the state.
        merged_adapters: names of the adapters whose update the base weight holds, in the order they went in.
        snell_spec: kernel function, gate, groups, rank and sparsity by adapter name.
        snell_start: what is subtracted from the update of an adapter that starts as the identity, by adapter name.
    """

    snell_A: nn.ModuleDict
    snell_B: nn.ModuleDict
    snell_theta: nn.ModuleDict

    tuner = "SNELL"
    adapter_layer_names: tuple[str, ...] = ("snell_A", "snell_B", "snell_theta")
    other_param_names: tuple[str, ...] = ("snell_dropout", "snell_spec", "snell_scale", "snell_constants")
    other_param_names += ("snell_start", "_own_sparsity", "scaling", "snell_competition")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *settings: Any,
        fan_in_fan_out: bool = False,
        quantisation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(base_layer, fan_in_fan_out=fan_in_fan_out, quantisation=quantisation)
        self._prepare()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, *settings)

    def _prepare(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.snell_dropout = nn.ModuleDict()
        self.snell_spec: dict[str, Spec] = {}
        self.snell_scale: dict[str, float] = {}
        self.snell_constants: dict[str, Tensor] = {}
        self.snell_start: dict[str, Start | None] = {}
        self.scaling = {}
        # PEFT saves what stands below a child's name: this one has no parameters, but sparsities are saved under it.
        self.snell_sparsity = nn.ModuleDict()
        self._own_sparsity: dict[str, float] = {}
        self.snell_competition: dict[str, Competition] = {}

    def update_layer(self, adapter_name: str, spec: Spec, config: SnellConfig) -> None:
        """Add an adapter, or draw it anew."""
        device, dtype = base.device_and_dtype(self.base_layer)
        options: dict[str, Any] = {"device": device, "dtype": factor_dtype(dtype)}
        A = torch.empty(self.in_features, spec.rank, **options)
        B = torch.empty(self.out_features, spec.rank, **options)
        theta = torch.empty(spec.num_theta, **options)
        seeded = partial(draw_identity, seed=config.init_seed)
        draws: dict[Any, Callable[..., Any]] = {True: draw, False: draw_visible, "identity": seeded}
        self.snell_start[adapter_name] = draws[config.init_weights](A, B, theta, spec, config.scale)
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
        self.scaling[adapter_name] = 1.0
        self._own_sparsity.pop(adapter_name, None)
        self.snell_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(active) == 1 and not args and not kwargs and not self._drops(active[0]) and self.scaling[active[0]] == 1:
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

    def _adapt_samples(self, y: Tensor, x: Tensor, samples: Tensor, name: str) -> Tensor:
        return y.index_add(0, samples, self.share(x[samples], name).to(y.dtype))

    def _drops(self, name: str) -> bool:
        return self.training and isinstance(self.snell_dropout[name], nn.Dropout)

    def share(self, x: Tensor, name: str) -> Tensor:
        """The adapter's share of the output, ``scaling x dW^T``."""
        split = base.split(self.base_layer, self.fan_in_fan_out)
        if split is None:
            return self._scaled(functional.linear(x, None, None, self._update(name)), name)
        return self._scaled(split.leave(functional.linear(split.enter(x), None, None, self._update(name))), name)

    def _update(self, name: str) -> Update:
        A, B, theta, spec = self._parameters_of(name)
        split = base.split(self.base_layer, self.fan_in_fan_out)
        start, competition = self.snell_start[name], self.snell_competition.get(name)
        if competition is not None:
            constant = None if start is None else competition.start(self)
            return functional.update(A, B, theta, spec, constant, competition.tau(self))
        rest = A, B, theta, spec, None if start is None else start.like(A).update
        return functional.update(*rest) if split is None else split.update(*rest)

    def _parameters_of(self, name: str) -> Parameters:
        theta = self.snell_theta[name]() if name in self.snell_theta else self.snell_constants[name]
        return full(self.snell_A[name]()), full(self.snell_B[name]()), full(theta), self.snell_spec[name]

    def snell_parameters(self) -> Iterator[Parameters]:
        """A, B, theta and the make-up of each adapter's update, for what works on all updates of a model."""
        return (self._parameters_of(name) for name in self.adapter_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense dW of one adapter, less its start's, scaled, laid out as the base weight, in the factors' dtype."""
        delta = functional.dense(self._update(adapter), scale=self.scaling[adapter])
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``peft.convert_to_lora`` can take this adapter; :func:`lora_error` says what it loses."""
        return base.split(self.base_layer, self.fan_in_fan_out) is None

    def _change(self, name: str, weight: Tensor, safe_merge: bool) -> Merged:
        update, scale = self._update(name), self.scaling[name]
        dense = (functional.dense(update, rows, weight[rows].flatten(1), scale) for rows in row_blocks(update))
        if safe_merge and not all(rows.isfinite().all() for rows in dense):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return Merged.of(update, scale)

    def set_sparsity(self, adapter_name: str, sparsity: float) -> None:
        """Give an adapter of this layer a sparsity of its own from now on. It is saved and loaded with the factors.

        Raises:
            ValueError: outside [0, 1), or from or to 0, which would change the gate; or layers compete with each other.
        """
        if adapter_name in self.snell_competition:
            raise ValueError("sparsity of a layer cannot be set where competition is 'model': layers compete for it")
        spec = replace(self.snell_spec[adapter_name], sparsity=sparsity)
        if spec.effective_gate != self.snell_spec[adapter_name].effective_gate:
            raise ValueError(f"sparsity must stay above 0, or the gate would change; got {sparsity}")
        self.snell_spec[adapter_name] = spec
        self._own_sparsity[adapter_name] = sparsity

    def has_own_sparsity(self, adapter_name: str) -> bool:
        """Whether :meth:`set_sparsity` has given the adapter one in this layer."""
        return adapter_name in self._own_sparsity

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, sparsity in self._own_sparsity.items():
            destination[f"{prefix}snell_sparsity.{name}.weight"] = torch.tensor(sparsity, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.adapter_names:
            sparsity = state_dict.pop(f"{prefix}snell_sparsity.{name}.weight", None)
            if sparsity is not None:
                self.set_sparsity(name, sparsity.item())
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        if weight is None or A.is_meta or weight.flatten(1).shape != (self.out_features, self.in_features):
            return 0.0
        return relative_size(A, B, theta, spec, weight.flatten(1))

    def _moved(self) -> None:
        # Written anew rather than moved: what a model holds after .to_empty() is not what it held before.
        for name, spec in self.snell_spec.items():
            A = self._parameters_of(name)[0]
            if (start := self.snell_start[name]) is not None:
                self.snell_start[name] = start = start.like(A)
            if name in self.snell_constants:
                theta = torch.tensor(spec.initial_theta(self.snell_scale[name]), dtype=A.dtype, device=A.device)
                self.snell_constants[name] = theta if start is None else start.update.theta
