"""transformers' own classes at a size that builds in milliseconds, with a batch for each; no network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from snell.peft import SnellConfig

VOCABULARY = 67
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes, **TOKENS))


def gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, **TOKENS))


def llama() -> tf.PreTrainedModel:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 36}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, **TOKENS))


def t5() -> tf.PreTrainedModel:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 36, "num_layers": 2, "num_heads": 3}
    tokens = {**TOKENS, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCABULARY, **sizes, **tokens))


def vit() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=12, patch_size=6, num_labels=3, **sizes))


def _texts(samples: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (samples, 7))}


def _causal(samples: int) -> dict[str, torch.Tensor]:
    batch = _texts(samples)
    return {**batch, "labels": batch["input_ids"]}


BUILDERS = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit}

_BATCHES: dict[str, Callable[[int], dict[str, torch.Tensor]]] = {
    "bert": lambda k: {**_texts(k), "labels": torch.randint(3, (k,))},
    "gpt2": _causal,
    "llama": _causal,
    "t5": lambda k: {**_texts(k), "labels": torch.randint(3, VOCABULARY, (k, 5))},
    "vit": lambda k: {"pixel_values": torch.randn(k, 3, 12, 12), "labels": torch.randint(3, (k,))},
}


def build(name: str) -> tf.PreTrainedModel:
    """A fresh base model, in evaluation mode."""
    return BUILDERS[name]().eval()


def batch(name: str, samples: int = 3) -> dict[str, torch.Tensor]:
    """Random inputs and labels."""
    return _BATCHES[name](samples)


def config(**settings) -> SnellConfig:
    """Every linear layer, with an update that shows."""
    return SnellConfig(**{"r": 4, "target_modules": "all-linear", "init_weights": False, "scale": 0.1, **settings})


def adapted(name: str, **settings) -> tuple[PeftModel, tf.PreTrainedModel]:
    """An adapted model in evaluation mode, and an untouched copy of its base."""
    base = build(name)
    untouched = copy.deepcopy(base)
    return get_peft_model(base, config(**settings)).eval(), untouched


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **more) -> torch.Tensor:
    """The outputs that are compared."""
    return model(**inputs, **more).logits


def train(model: torch.nn.Module, inputs: dict[str, torch.Tensor], steps: int = 3) -> list[float]:
    """A plain PyTorch loop; the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
