"""The layer around a base layer whose update comes from a bank by masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snell.peft.common import base
from snell.peft.common.factor import Factor
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.layer import AdaptedLinear
from snell.peft.xpeft.bank import Bank, Source
from snell.peft.xpeft.config import XpeftConfig
from snell.peft.xpeft.masks import mix, weights
from snell.update import Parameters

__all__ = ["MaskedLinear", "use_profiles"]


class MaskedLinear(AdaptedLinear):
    """``y = x (W0 + dW(A, B))^T + b`` with A and B mixed from a bank by the active profile's masks.

    Attributes:
        xpeft_A, xpeft_B: logits of the masks ``[profiles, N]``, each the ``weight`` of a leaf module by adapter name.
        xpeft_bank: the constant bank by adapter name; no part of the state.
    """

    xpeft_A: nn.ModuleDict
    xpeft_B: nn.ModuleDict

    tuner = "X-PEFT"
    adapter_layer_names = ("xpeft_A", "xpeft_B")
    other_param_names = (*AdaptedLinear.other_param_names, "xpeft_bank", "xpeft_config", "xpeft_profiles")

    def _prepare(self) -> None:
        super()._prepare()
        self.xpeft_bank: dict[str, Bank] = {}
        self.xpeft_config: dict[str, XpeftConfig] = {}
        self.xpeft_profiles: Tensor | None = None

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, config: XpeftConfig, module: str, source: Source, make_up: SnellConfig
    ) -> None:
        """Add an adapter, or start its masks anew."""
        if base.split(self.base_layer, self.fan_in_fan_out) is not None:
            raise ValueError(f"{module} cannot be adapted: its weight is split over processes")
        bank = source.bank(module, self.in_features, self.out_features)
        device, _ = base.device_and_dtype(self.base_layer)
        spec = make_up.spec(bank.rank, make_up.sparsity)
        theta = source.theta(module)
        if theta is None:
            theta = torch.tensor(spec.initial_theta(make_up.scale), dtype=torch.float32)
        self.xpeft_bank[adapter_name], self.xpeft_config[adapter_name] = bank, config
        for logits in (self.xpeft_A, self.xpeft_B):
            start = torch.zeros(config.num_profiles, bank.num, device=device)
            logits[adapter_name] = Factor(start if config.init_weights else nn.init.normal_(start))
        self.snell_spec[adapter_name], self.snell_scale[adapter_name] = spec, make_up.scale
        self.snell_constants[adapter_name], self.snell_start[adapter_name] = theta, None
        self.snell_dropout[adapter_name], self.scaling[adapter_name] = nn.Identity(), 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def masks(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The logits ``[P, N]`` of both masks."""
        A, B = self._factors(name)
        return A.weight, B.weight

    def mixed(self, name: str, profiles: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``A [P, n, r]`` and ``B [P, m, r]`` of these profiles, float32, LoRA's scale in B; None: of the only one.

        Raises:
            ValueError: there are several profiles, and none is asked for.
        """
        config, logits = self.xpeft_config[name], [self.xpeft_A[name](), self.xpeft_B[name]()]
        if profiles is not None:
            logits = [each[profiles] for each in logits]
        elif config.num_profiles > 1:
            raise ValueError(
                f"adapter {name!r} has {config.num_profiles} profiles: say whose a sample is by snell.peft.use_profiles"
            )
        k, bank = config.chosen, self.xpeft_bank[name].on(logits[0].device)
        of = [weights(each.float(), k, config.combine == "mean") for each in logits]
        few = k is not None and 4 * k <= bank.A.shape[0]  # gathering more rows takes longer than reading all
        A, B = (mix(w, factor, few) for w, factor in zip(of, bank, strict=True))
        return A, B if self._competes(name) else B * self.snell_scale[name]

    def _competes(self, name: str) -> bool:
        """Whether the update is SNELL's; LoRA's product needs no dW."""
        return self.snell_spec[name].kernel != "linear" or self.snell_spec[name].sparsity > 0

    def _parameters_of(self, name: str) -> Parameters:
        A, B = self.mixed(name, self.xpeft_profiles)
        if len(A) > 1:
            raise ValueError(f"adapter {name!r} is asked for several profiles at once, of which it can give one update")
        self.snell_constants[name] = theta = self.snell_constants[name].to(A.device)
        return A[0], B[0], theta, self.snell_spec[name]

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.xpeft_profiles is None and all(self._competes(name) for name in active):
            return super()._adapted(x, active, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        for name in active:
            y = y + self.share(x, name).to(y.dtype)
        return y

    def share(self, x: Tensor, name: str) -> Tensor:
        """The adapter's share of the output, ``x dW^T``; with each sample's own profile, where they are said."""
        profiles = self.xpeft_profiles
        if profiles is None:
            if self._competes(name):
                return super().share(x, name)
            A, B = (factor[0].to(x.dtype) for factor in self.mixed(name))
            return self._scaled(x @ A @ B.t(), name)
        if len(profiles) != len(x):
            raise ValueError(f"profiles must have an entry for each of the {len(x)} samples; got {len(profiles)}")
        used, place = profiles.unique(return_inverse=True)
        if not self._competes(name):
            A, B = (factor[place].to(x.dtype) for factor in self.mixed(name, used))
            y = (x.flatten(1, -2) @ A @ B.mT).unflatten(1, x.shape[1:-1]) if x.dim() > 2 else _rows(x, A, B)
            return self._scaled(y, name)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for i, profile in enumerate(used):
            samples = (place == i).nonzero().squeeze(1)
            with self._only(profile):
                y = y.index_copy(0, samples, super().share(x[samples], name).to(y.dtype))
        return y

    @contextmanager
    def _only(self, profile: Tensor) -> Iterator[None]:
        before, self.xpeft_profiles = self.xpeft_profiles, profile.view(1)
        try:
            yield
        finally:
            self.xpeft_profiles = before

    def _moved(self) -> None:
        """Bank and constants follow the masks when they are next asked for."""


def _rows(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return (x.unsqueeze(1) @ A @ B.mT).squeeze(1)


@contextmanager
def use_profiles(model: nn.Module, profiles: Tensor | list[int]) -> Iterator[None]:
    """Inside the context, each sample of a batch gets its own profile, of those that the adapter has.

    Backward of a checkpointed model belongs inside too.

    Args:
        profiles: ``[batch]`` numbers of profiles.

    Raises:
        ValueError: a profile that an adapter does not have, or a model without masks.
    """
    layers = [module for module in model.modules() if isinstance(module, MaskedLinear)]
    if not layers:
        raise ValueError("model must have an X-PEFT adapter to use profiles of")
    wanted = torch.as_tensor(profiles)
    fewest = min(config.num_profiles for layer in layers for config in layer.xpeft_config.values())
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < fewest:
        raise ValueError(f"profiles must lie in [0, {fewest}); got {sorted(set(wanted.tolist()))}")
    for layer in layers:
        layer.xpeft_profiles = wanted.to(layer.masks(layer.adapter_names[0])[0].device)
    try:
        yield
    finally:
        for layer in layers:
            layer.xpeft_profiles = None
