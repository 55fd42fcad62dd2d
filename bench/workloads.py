"""The models of the model benchmarks, of random weights, each with a batch of random data; and a step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn

from snell.bench import core, memory
from snell.bench.contenders import ADAPT
from snell.bench.names import VITS


class Workload(NamedTuple):
    """A model that takes the batch as keywords and answers with a ``loss``; both on one device."""

    name: str
    model: nn.Module
    batch: dict[str, Tensor]


def vit(name: str, device: str, images: int, **sizes: Any) -> Workload:
    """A vision transformer of :data:`VITS`, float32, with a head of 100 classes; ``sizes`` override its own."""
    config = tf.ViTConfig(num_labels=100, **(VITS[name] | sizes))
    with torch.device(device):
        model = tf.ViTForImageClassification(config)
        pixels = torch.randn(images, 3, config.image_size, config.image_size)
        batch = {"pixel_values": pixels, "labels": torch.randint(100, (images,))}
    return Workload(f"{name}, {images} images", model, batch)


def vit_b(device: str) -> Workload:
    return vit("ViT-B/16", device, images=8 if device == "cpu" else 64)


def bert_base(device: str) -> Workload:
    """BERT-base, float32, two classes; sequences of 128 tokens."""
    sequences = 8 if device == "cpu" else 64
    with torch.device(device):
        model = tf.BertForSequenceClassification(tf.BertConfig())
        batch = {"input_ids": torch.randint(30000, (sequences, 128)), "labels": torch.randint(2, (sequences,))}
    return Workload(f"BERT-base, {sequences} x 128 tokens", model, batch)


def llama(device: str) -> Workload:
    """On a GPU four layers of Llama-2-7B's shape in bfloat16; on a CPU a quarter of its width in float32."""
    shrink, tokens, dtype = (4, 512, torch.float32) if device == "cpu" else (1, 2048, torch.bfloat16)
    sizes = {"hidden_size": 4096 // shrink, "intermediate_size": 11008 // shrink, "num_attention_heads": 32 // shrink}
    config = tf.LlamaConfig(**sizes, num_hidden_layers=4)
    with torch.device(device):
        model, words = tf.LlamaForCausalLM(config).to(dtype), torch.randint(config.vocab_size, (1, tokens))
    name = f"Llama, 4 x {config.hidden_size}, {tokens} tokens, {dtype}".replace("torch.", "")
    return Workload(name, model, {"input_ids": words, "labels": words})


#: The models of ``snell bench models``, each made on a device.
MODELS: dict[str, Callable[[str], Workload]] = {"vit-b": vit_b, "bert-base": bert_base, "llama": llama}


class Training:
    """The workload's model, changed in place to be tuned by ``method``, with AdamW and its state.

    Args:
        keep_gradients: whether gradients stay allocated between steps, and a step adds to zeros.

    Raises:
        ValueError, RuntimeError: the method cannot tune the model.
    """

    def __init__(self, method: str, workload: Workload, rank: int, *, keep_gradients: bool = False) -> None:
        self.batch, self.keep_gradients = workload.batch, keep_gradients
        self.model = ADAPT[method](workload.model, rank).train()
        self.optimizer = memory.adamw(self.model, 1e-4)
        self._drop_gradients()

    def forward(self) -> Tensor:
        """The loss, of new parameters: thresholds are selected anew."""
        core.forget()
        return self.model(**self.batch).loss

    def step(self) -> None:
        """Forward, backward and AdamW's update."""
        self.forward().backward()
        self.optimizer.step()
        self._drop_gradients()

    def held(self) -> dict[str, int]:
        """Bytes: all tensors of the model, AdamW's state, what autograd saves in a forward; and numbers trained."""
        return {
            "model_bytes": memory.storage_bytes(memory.held_tensors(self.model)),
            "optimizer_bytes": memory.optimizer_bytes(self.optimizer),
            "saved_bytes": memory.saved_bytes(self.forward, memory.held_tensors(self.model)),
            "trainable": memory.num_trained(self.model),
        }

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
