"""What the benchmarks compare and on which models: names, colours and sizes, without any import that takes time."""

from __future__ import annotations

from typing import NamedTuple


class Shown(NamedTuple):
    """How a method appears in tables and pictures."""

    label: str
    colour: str


#: The methods of tuning; :mod:`snell.bench.contenders` defines each.
METHODS = {
    "snell": Shown("SNELL", "#1f77b4"),
    "lora": Shown("PEFT LoRA", "#e08e45"),
    "dora": Shown("PEFT DoRA", "#c44e52"),
    "shira": Shown("PEFT SHiRA", "#8172b3"),
    "full": Shown("full fine-tuning", "#5f6b7a"),
    "published": Shown("published SNELL", "#b0b7bf"),
    "mixture": Shown("SNELL, mixture", "#17becf"),
    "published-mixture": Shown("published SNELLA", "#8c6d31"),
}

#: The methods of ``snell bench red``.
RED_METHODS = {
    "red": "RED",
    "red-plain": "RED in plain PyTorch",
    "ia3": "PEFT (IA)^3",
    "lora-edited": "PEFT LoRA on the same layers",
    "lora": "PEFT LoRA on every layer",
}

#: Kernel functions, in Okabe and Ito's colours, which colour-blind readers tell apart.
KERNELS = {
    "linear": Shown("linear (LoRA)", "#e69f00"),
    "piecewise_linear": Shown("piecewise linear", "#0072b2"),
    "sigmoid": Shown("sigmoid", "#009e73"),
    "rbf": Shown("RBF", "#cc79a7"),
}

#: The models of ``snell bench models``; :mod:`snell.bench.workloads` makes them.
MODELS = ("vit-b", "bert-base", "llama")

#: Sizes of the vision transformers for images of 224 x 224: base, large and huge.
VITS: dict[str, dict[str, int]] = {
    "ViT-B/16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "ViT-L/16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
VITS["ViT-H/14"] = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
VITS["ViT-H/14"]["patch_size"] = 14
