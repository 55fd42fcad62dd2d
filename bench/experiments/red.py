"""A whole training step of RED beside plain PyTorch's RED, (IA)^3 and LoRA.

    snell bench red [--device cuda] [--model vit-b] [--rank 8]

The models, the step and the memory are those of ``snell bench models``. RED edits the outputs of the second layer of
each feed-forward block. LoRA adapts the same layers, and in another row every linear layer but the output's: ratios are
to that row. (IA)^3 scales keys, values and the inputs of the layers that RED edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from snell.bench.contenders import quiet_libraries
from snell.bench.experiments.models import measure_model, training_bytes
from snell.bench.names import RED_METHODS
from snell.bench.report import Columns, Document, made_by, table
from snell.bench.workloads import MODELS


def measure(device: str, rank: int, repetitions: int, model: Sequence[str]) -> dict[str, Any]:
    """The chosen models; unless given, a vision transformer and a Llama shape."""
    quiet_libraries()
    names = model or ("vit-b", "llama")
    results = [measure_model(MODELS[name], device, rank, repetitions, RED_METHODS) for name in names]
    return {"file": f"red-{device}", "settings": {"rank of LoRA": rank}, "models": results}


COLUMNS: Columns = [
    ("model", "{model}"),
    ("method", "{label}"),
    ("step", "{seconds:s}"),
    ("of LoRA's", "{ratio_to_lora:.2f}"),
    ("all memory, of LoRA's", "{of_lora:.3f}"),
    ("extra memory", "{extra_peak_bytes:size}"),
    ("saved for backward", "{saved_bytes:size}"),
    ("trainable", "{trainable:,}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    rows = []
    for result in document["models"]:
        lora = training_bytes(result["methods"]["lora"])
        for method, entry in result["methods"].items():
            of_lora = training_bytes(entry) / lora
            rows.append({"model": result["model"], "label": RED_METHODS[method], "of_lora": of_lora, **entry})
    return f"{table(COLUMNS, rows)}\n\n{made_by(document)}"
