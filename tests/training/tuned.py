"""Small models under each tuner, and what a step of theirs keeps."""

from __future__ import annotations

from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from small_models import batch, build, config
from torch import Tensor, nn

from snell.training import SelectiveFreezing

TUNERS = {
    "snell": config,
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["up_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def tuned(tuner: str = "snell", name: str = "llama") -> PeftModel:
    """A small model, all of whose linear layers the tuner adapts with an update that shows; in training mode."""
    return get_peft_model(build(name), TUNERS[tuner]()).train()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def freezing(model: nn.Module, optimizer: Any, **settings: Any) -> SelectiveFreezing:
    """Of ten steps, unless told otherwise without a warm-up."""
    settings = {"steps": 10, "warmup": 0.0, "end": 1.0, **settings}
    return SelectiveFreezing(model, optimizer, settings.pop("batch", None) or batch("llama", 4), **settings)


def lowest(count: int) -> Any:
    """An importance that makes the ``count`` adapters that run first freeze first, at the first check."""
    calls = iter(range(10**6))

    def importance(output: Tensor, change: Tensor) -> float:
        return 0.1 if next(calls) < count else 0.9

    return importance


def saved(model: nn.Module, inputs: dict[str, Tensor]) -> dict[int, int]:
    """Bytes of each storage, by address, that autograd keeps between forward and backward, parameters left out."""
    held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del loss
    return {address: size for address, size in sizes.items() if address not in held}
