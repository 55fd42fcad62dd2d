"""The ways of tuning that the benchmarks compare, each defined once, for one layer and for whole models alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell.peft import SnellConfig

RANK, SPARSITY, GROUPS, SCALE = 32, 0.9, 2, 0.1

#: Output layers by their names in transformers. They are left as they are, as by PEFT's own "all-linear".
OUTPUT_LAYERS = ("classifier", "lm_head")


class Published(nn.Module):
    """The published algorithm, written plainly: cdist, quantile, float(threshold), merge under checkpointing."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        options = {"device": base.weight.device}
        self.A = nn.Parameter(torch.empty(base.in_features, rank, **options))
        self.B = nn.Parameter(torch.empty(base.out_features, rank, **options))
        for factor in (self.A, self.B):
            bound = (factor.numel() / GROUPS) ** -0.5
            nn.init.uniform_(factor, -bound, bound)

    def _merge(self, A: Tensor, B: Tensor) -> Tensor:
        pairs = zip(A.chunk(GROUPS, 1), B.chunk(GROUPS, 1), strict=True)
        K = sum((-1) ** p * SCALE * torch.cdist(b, a) for p, (a, b) in enumerate(pairs))
        magnitude = K.detach().abs()
        threshold = float(torch.quantile(magnitude, SPARSITY))
        return K * torch.where(magnitude > threshold, magnitude, 0)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n] -> [..., m]``."""
        delta = checkpoint(self._merge, self.A, self.B, use_reentrant=False)
        return nn.functional.linear(x, self.base.weight + delta.to(x.dtype), self.base.bias)


def quiet_libraries() -> None:
    """Keep warnings that are not about what is measured from breaking up progress bars."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Sparse invariant checks")


def targets(model: nn.Module) -> list[str]:
    """Names of the linear layers that every method but full fine-tuning adapts: all but the output's."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in OUTPUT_LAYERS
    ]


def _full(model: nn.Module, rank: int) -> nn.Module:
    return model.requires_grad_(True)


def _published(model: nn.Module, rank: int) -> nn.Module:
    model.requires_grad_(False)
    for name in targets(model):
        model.set_submodule(name, Published(model.get_submodule(name), rank))
    return model


def _by_peft(configure: Callable[[int], PeftConfig]) -> Callable[[nn.Module, int], nn.Module]:
    def adapt(model: nn.Module, rank: int) -> nn.Module:
        config = configure(rank)
        config.target_modules = set(targets(model))
        # PEFT's methods in their fastest form: what they train is in the base's dtype. By default PEFT keeps it in
        # float32 and converts x twice in every layer. SNELL's factors are float32 all the same.
        return get_peft_model(model, config, autocast_adapter_dtype=False)

    return adapt


class Method(NamedTuple):
    """``adapt(model, rank)`` returns the model with the method's parameters trainable, made of ``model`` itself."""

    label: str
    colour: str
    adapt: Callable[[nn.Module, int], nn.Module]


#: SHiRA's r counts as LoRA's does: it trains r (m + n) entries of a weight, at places drawn at random.
METHODS: dict[str, Method] = {
    "snell": Method(
        "SNELL", "#1f77b4", _by_peft(lambda r: SnellConfig(r=r, sparsity=SPARSITY, groups=GROUPS, scale=SCALE))
    ),
    "lora": Method("PEFT LoRA", "#e08e45", _by_peft(lambda r: LoraConfig(r=r, lora_alpha=r))),
    "dora": Method("PEFT DoRA", "#c44e52", _by_peft(lambda r: LoraConfig(r=r, lora_alpha=r, use_dora=True))),
    "shira": Method("PEFT SHiRA", "#8172b3", _by_peft(lambda r: ShiraConfig(r=r))),
    "full": Method("full fine-tuning", "#5f6b7a", _full),
    "published": Method("published SNELL", "#b0b7bf", _published),
}
