"""The ways of tuning that the benchmarks compare, each defined once, for one layer and for whole models alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from snell import SnellLinear
from snell.peft import RedConfig, SnellConfig

RANK, SPARSITY, GROUPS, SCALE = 32, 0.9, 2, 0.1

#: Layers that no method but full fine-tuning adapts: heads, as by PEFT's "all-linear", and a pooler that is not used.
LEFT_ALONE = ("classifier", "head", "pooler.dense")

Layer = TypeVar("Layer", bound=nn.Module)
Adapt = Callable[..., nn.Module]


class Published(nn.Module):
    """The published algorithm, written plainly: cdist, quantile, float(threshold), merge under checkpointing."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        sizes = (base.in_features, rank), (base.out_features, rank)
        self.A, self.B = (nn.Parameter(torch.empty(size, device=base.weight.device)) for size in sizes)
        for factor in (self.A, self.B):
            bound = (factor.numel() / GROUPS) ** -0.5
            nn.init.uniform_(factor, -bound, bound)

    def _kernel_matrix(self, A: Tensor, B: Tensor) -> Tensor:
        pairs = zip(A.chunk(GROUPS, 1), B.chunk(GROUPS, 1), strict=True)
        return sum((-1) ** p * SCALE * torch.cdist(b, a) for p, (a, b) in enumerate(pairs))  # type: ignore[return-value]

    def _merge(self, A: Tensor, B: Tensor) -> Tensor:
        K = self._kernel_matrix(A, B)
        magnitude = K.detach().abs()
        threshold = float(torch.quantile(magnitude, SPARSITY))
        return K * torch.where(magnitude > threshold, magnitude, 0)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n] -> [..., m]``."""
        delta = checkpoint(self._merge, self.A, self.B, use_reentrant=False)
        return nn.functional.linear(x, self.base.weight + delta.to(x.dtype), self.base.bias)


class PublishedMixture(Published):
    """The same for SNELLA: a softmax over each column's outputs is added, with three trained scalars."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__(base, rank)
        start = {"alpha": 1.0, "beta": 0.0, "gamma": 1.0}
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(torch.tensor([value], device=base.weight.device)))

    def _kernel_matrix(self, A: Tensor, B: Tensor) -> Tensor:
        K = super()._kernel_matrix(A, B)
        return K + self.alpha * torch.softmax(K / self.gamma, 0) + self.beta


class PlainRed(nn.Module):
    """RED as plain PyTorch: a product and a sum, whose gradients autograd takes one by one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = nn.Parameter(torch.ones(base.out_features, device=base.weight.device))
        self.bias = nn.Parameter(torch.zeros(base.out_features, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n] -> [..., m]``."""
        y = self.base(x)
        return (self.scaling * y + self.bias).to(y.dtype)


def quiet_libraries() -> None:
    """Keep warnings that are not about what is measured from breaking up progress bars."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def targets(model: nn.Module) -> list[str]:
    """Names of the linear layers that every method but full fine-tuning adapts."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linears if not name.endswith(LEFT_ALONE)]


def replaced(
    model: nn.Module,
    make: Callable[[Layer], nn.Module],
    kind: type[Layer] = nn.Linear,
    endings: tuple[str, ...] = ("",),
) -> nn.Module:
    """The model with ``make(layer)`` in the place of every layer of ``kind`` that is adapted and is named so."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, kind) and name.endswith(endings) and not name.endswith(LEFT_ALONE):
            model.set_submodule(name, make(layer))
    return model


def _by_peft(configure: Callable[..., PeftConfig]) -> Adapt:
    def adapt(model: nn.Module, rank: int, head: str | None = None, **settings: Any) -> nn.Module:
        config = configure(**{"r": rank, "target_modules": set(targets(model)), **settings})
        if head is not None:
            config.modules_to_save = [head]
        # PEFT's methods in their fastest form: what they train is in the base's dtype. By default PEFT keeps it in
        # float32 and converts x twice in every layer. SNELL's factors are float32 all the same.
        return get_peft_model(model, config, autocast_adapter_dtype=False)

    return adapt


def _lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"lora_alpha": settings["r"], **settings})


#: The second layer of a feed-forward block, whose outputs RED edits; (IA)^3 scales its inputs, and keys and values.
EDITED, KEYS_AND_VALUES = ("fc2", "down_proj"), ("k_proj", "v_proj")


def _ia3(model: nn.Module, rank: int) -> nn.Module:
    names = {name for name in targets(model) if name.endswith((*EDITED, *KEYS_AND_VALUES))}
    config = IA3Config(target_modules=names, feedforward_modules={name for name in names if name.endswith(EDITED)})
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _plain_red(model: nn.Module, rank: int) -> nn.Module:
    model.requires_grad_(False)
    return replaced(model, lambda layer: PlainRed(layer), endings=EDITED)


def _lora_on_edited(model: nn.Module, rank: int) -> nn.Module:
    names = {name for name in targets(model) if name.endswith(EDITED)}
    return get_peft_model(model, _lora(r=rank, target_modules=names), autocast_adapter_dtype=False)


#: ``adapt(model, rank)`` returns the model with the method's parameters trainable, made of ``model`` itself. Those of
#: PEFT also take ``head``, a module that is trained whole, and settings of their own. SHiRA's r counts as LoRA's does:
#: it trains r (m + n) entries of a weight, at places drawn at random.
ADAPT: dict[str, Adapt] = {
    "snell": _by_peft(lambda **s: SnellConfig(**{"sparsity": SPARSITY, "groups": GROUPS, "scale": SCALE, **s})),
    "lora": _by_peft(_lora),
    "dora": _by_peft(lambda **settings: _lora(use_dora=True, **settings)),
    "shira": _by_peft(ShiraConfig),
    "full": lambda model, rank: model.requires_grad_(True),
    "red": lambda model, rank: get_peft_model(model, RedConfig()),
    "red-plain": _plain_red,
    "ia3": _ia3,
    "lora-edited": _lora_on_edited,
    "published": lambda model, rank: replaced(model.requires_grad_(False), lambda layer: Published(layer, rank)),
    "mixture": _by_peft(
        lambda **s: SnellConfig(**{"sparsity": SPARSITY, "groups": GROUPS, "scale": SCALE, "kernel": "mixture", **s})
    ),
    "published-mixture": lambda model, rank: replaced(
        model.requires_grad_(False), lambda layer: PublishedMixture(layer, rank)
    ),
}


def snell_layers(model: nn.Module, rank: int, **settings: Any) -> nn.Module:
    """The model with SnellLinear, the drop-in layer, in every place that PEFT's SNELL would adapt."""
    return replaced(model, lambda linear: SnellLinear.from_linear(linear, rank=rank, **settings))


class _OneLayer(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear


def one_layer(method: str, linear: nn.Linear, rank: int = RANK, **settings: Any) -> nn.Module:
    """``linear`` tuned by the method; SNELL as the drop-in layer, PEFT's methods without the model's wrapper."""
    if method in ("snell", "mixture"):
        kernel = {"kernel": "mixture"} if method == "mixture" else {}
        return snell_layers(_OneLayer(linear), rank, **kernel, **settings).linear
    model = ADAPT[method](_OneLayer(linear), rank, **settings)
    return (model.get_base_model() if isinstance(model, PeftModel) else model).linear


def probe(model: nn.Module, head: str) -> nn.Module:
    """The model frozen but for its head: a linear probe."""
    model.requires_grad_(False).get_submodule(head).requires_grad_(True)
    return model
