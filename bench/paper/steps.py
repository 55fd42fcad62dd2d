"""The paper's Table A14: the time of a training step of SNELL-8 relative to LoRA-8, on ViT-B/16.

    snell bench steps [--device cuda]

The measurement is that of ``snell bench models --model vit-b --rank 8``, on 8 images on a CPU and 64 on a GPU: SNELL,
LoRA and the published algorithm in turns, on every linear layer of the encoder, with random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from snell.bench import models
from snell.bench.record import device_option, made_by, out_option
from snell.bench.workloads import vit_b

__all__ = ["main", "report"]

RANK = 8

#: Table A14 of arXiv 2411.01800: the time of LoRA-8 and of SNELL-8. Their unit is not at hand; the ratio needs none.
PAPER_LORA, PAPER_SNELL = 0.443, 0.557


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    (result,) = document["models"]
    ratio = result["methods"]["snell"]["ratio_to_lora"]
    return (
        f"{models.table([result])}\n\nSNELL-8 takes {ratio:.2f} times LoRA-8's step here; in the paper's Table A14, on "
        f"its GPU and data, {PAPER_SNELL / PAPER_LORA:.2f} times.\n\n{made_by(document)}"
    )


@click.command(help=__doc__)
@device_option
@click.option("--repetitions", type=int, default=5, show_default=True, help="Timed steps of each, fewer of slow ones.")
@out_option
def main(device: str, repetitions: int, out: Path) -> None:
    models.run([vit_b], device, RANK, repetitions, out, "steps", ("snell", "lora", "published"))


if __name__ == "__main__":
    main()
