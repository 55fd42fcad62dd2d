"""The paper's Table A14: the time of a training step of SNELL-8 relative to LoRA-8, on ViT-B/16.

    snell bench steps [--device cuda]

The measurement is that of ``snell bench models --model vit-b --rank 8``, on 8 images on a CPU and 64 on a GPU: SNELL,
LoRA and the published algorithm in turns, on every linear layer of the encoder, with random weights.
"""

from __future__ import annotations

from typing import Any

from snell.bench.experiments import models
from snell.bench.experiments.models import draw
from snell.bench.report import Document, made_by

__all__ = ["draw", "measure", "report"]

#: Table A14 of arXiv 2411.01800: the time of LoRA-8 and of SNELL-8. Their unit is not at hand; the ratio needs none.
PAPER_LORA, PAPER_SNELL = 0.443, 0.557


def measure(device: str, repetitions: int) -> dict[str, Any]:
    """ViT-B/16 at rank 8."""
    found = models.measure(device, 8, repetitions, ["vit-b"], methods=("snell", "lora", "published"))
    return found | {"file": f"steps-{device}"}


def report(document: Document) -> str:
    """The results file as Markdown."""
    (result,) = document["models"]
    ratio = result["methods"]["snell"]["ratio_to_lora"]
    found = f"SNELL-8 takes {ratio:.2f} times LoRA-8's step here; in the paper's Table A14, on its GPU and data"
    return f"{models.tables(document)}\n\n{found}, {PAPER_SNELL / PAPER_LORA:.2f} times.\n\n{made_by(document)}"
