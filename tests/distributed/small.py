"""What the processes of a test run on, the same in each and in the one process they are compared with."""

from __future__ import annotations

import torch
import torch.distributed as dist
import transformers as tf
from peft import PeftConfig, PeftModel, get_peft_model

from snell.peft import RedConfig, SnellConfig

SAMPLES, STEPS, VOCABULARY = 8, 3, 41


def model(config: PeftConfig | None = None) -> PeftModel:
    """A small Llama, of SNELL by default, whose factors move hundreds of times what :func:`close` allows."""
    torch.manual_seed(11)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 36}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))
    if config is None:
        config = SnellConfig(r=4, target_modules="all-linear", init_weights=False, kernel="rbf", scale=4.0)
    return get_peft_model(base, config)


def red() -> PeftModel:
    """The same, with every linear layer's outputs edited."""
    return model(RedConfig(target_modules="all-linear", init_weights=False))


def mixture() -> PeftModel:
    """The same by the kernel function with a softmax, whose three scalars are trained."""
    settings = {"kernel": "mixture", "gate": "magnitude", "init_weights": False}
    return model(SnellConfig(r=4, target_modules="all-linear", **settings))


def competing() -> PeftModel:
    """The same with one competition over all layers."""
    settings = {"competition": "model", "gate": "magnitude", "init_weights": False}
    return model(SnellConfig(r=4, target_modules="all-linear", **settings))


def batch(rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """This process's share of one fixed batch."""
    tokens = torch.randint(3, VOCABULARY, (SAMPLES, 9), generator=torch.Generator().manual_seed(5))
    share = tokens.chunk(processes)[rank]
    return {"input_ids": share, "labels": share}


def optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)


def train(module: torch.nn.Module, inputs: dict[str, torch.Tensor], processes: int = 1) -> list[float]:
    """The losses of a plain loop, averaged over the processes."""
    steps, losses = optimizer(module), []
    for _ in range(STEPS):
        loss = module(**inputs).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        mean = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / processes)
    return losses


def factors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: p.detach() for key, p in module.named_parameters() if "snell_" in key or "repr_" in key}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], eps: float = 1e-5) -> None:
    """The sums of a step are split over processes and so rounded in another order; STEPS steps carry that on."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= eps * max(value.abs().max().item(), 1), key
