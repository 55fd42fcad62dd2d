"""The network, and the four ways of tuning it for another domain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from snell import SnellLinear
from snell.bench.demo_data import CLASSES

__all__ = ["METHODS", "RANK", "SETTINGS", "Method", "map_backbone", "new_vit", "shown_layer", "weight_change"]

RANK = 8

#: What the learning rate alone does not say. LoRA's alpha (of r, 2r, 4r) was chosen on the target's validation images,
#: with draws of labels that the demonstration does not use, and so were SNELL's defaults (bench/paper/gates.py).
SETTINGS = f"LoRA: rank {RANK}, alpha {RANK}. SNELL: rank {RANK}, otherwise its defaults."

Layer = TypeVar("Layer", bound=nn.Module)


class Method(NamedTuple):
    """``build`` makes a model with a new head out of the pre-trained one; every grid has the same number of rates."""

    name: str
    build: Callable[[nn.Module], nn.Module]
    learning_rates: tuple[float, ...]


def new_vit() -> ViTForImageClassification:
    """A vision transformer over 16 patches of 2x2 pixels, its weights drawn from torch's generator."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def map_backbone(model: nn.Module, kind: type[Layer], make: Callable[[Layer], nn.Module]) -> nn.Module:
    """Put ``make(layer)`` in the place of every layer of ``kind`` but the head."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, kind) and name != "classifier":
            model.set_submodule(name, make(layer))
    return model


def _with_new_head(pretrained: nn.Module) -> nn.Module:
    model = copy.deepcopy(pretrained)
    model.classifier = nn.Linear(model.classifier.in_features, CLASSES)
    return model


def _probe(pretrained: nn.Module) -> nn.Module:
    model = _with_new_head(pretrained).requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def _lora(pretrained: nn.Module) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", modules_to_save=["classifier"])
    return get_peft_model(_with_new_head(pretrained), config)


def _snell(pretrained: nn.Module) -> nn.Module:
    return map_backbone(_probe(pretrained), nn.Linear, lambda linear: SnellLinear.from_linear(linear, rank=RANK))


METHODS = (
    Method("linear probe", _probe, (1e-2, 3e-2, 1e-1, 3e-1)),
    Method("full fine-tuning", _with_new_head, (3e-4, 1e-3, 3e-3, 1e-2)),
    Method("LoRA (PEFT)", _lora, (1e-3, 3e-3, 1e-2, 3e-2)),
    Method("SNELL", _snell, (1e-3, 3e-3, 1e-2, 3e-2)),
)


def shown_layer(pretrained: nn.Module) -> str:
    """Name of the encoder's last linear layer that widens."""
    widening = [
        name
        for name, layer in pretrained.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features > layer.in_features
    ]
    return widening[-1]


def weight_change(model: nn.Module, pretrained: nn.Module, layer: str) -> Tensor:
    """dW ``[m, n]`` of the layer named ``layer`` in the pre-trained model, however the method holds it."""
    tuned = next(module for name, module in model.named_modules() if name.endswith(layer))
    with torch.no_grad():
        if isinstance(tuned, SnellLinear):
            return tuned.delta_weight()
        if isinstance(tuned, LoraLayer):
            return tuned.get_delta_weight("default")
        return tuned.weight - pretrained.get_submodule(layer).weight
