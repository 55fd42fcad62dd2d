"""A Llama and batches of tokens, small enough for thousands of training steps in minutes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 67


def tiny_llama() -> LlamaForCausalLM:
    """2 layers of width 32, in evaluation mode; the same weights at every call."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)).eval()


def token_batches(steps: int, seed: int) -> Tensor:
    """``[steps, 2, 12]`` int64: a batch for each step, which no other random draw disturbs."""
    return torch.randint(VOCABULARY, (steps, 2, 12), generator=torch.Generator().manual_seed(seed))
