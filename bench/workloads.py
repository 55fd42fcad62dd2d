"""The models of the model benchmarks, of random weights, each with a batch of random data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import nn

from snell.bench.tuned import Batch


class Workload(NamedTuple):
    """A model that takes the batch as keywords and answers with a ``loss``; both on one device."""

    name: str
    model: nn.Module
    batch: Batch


#: Sizes of the vision transformers for images of 224 x 224: base, large and huge.
VITS: dict[str, dict[str, int]] = {
    "ViT-B/16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "ViT-L/16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "ViT-H/14": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "patch_size": 14,
    },
}


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
    config = tf.LlamaConfig(
        hidden_size=4096 // shrink,
        intermediate_size=11008 // shrink,
        num_attention_heads=32 // shrink,
        num_hidden_layers=4,
    )
    with torch.device(device):
        model = tf.LlamaForCausalLM(config).to(dtype)
        words = torch.randint(config.vocab_size, (1, tokens))
    name = f"Llama, {config.num_hidden_layers} x {config.hidden_size}, {tokens} tokens, {dtype}"
    return Workload(name.replace("torch.", ""), model, {"input_ids": words, "labels": words})


#: The models of ``snell bench models``, each made on a device.
MODELS: dict[str, Callable[[str], Workload]] = {"vit-b": vit_b, "bert-base": bert_base, "llama": llama}
