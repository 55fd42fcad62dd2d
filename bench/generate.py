"""One unmerged layer for a few tokens, as generation calls it: beside the plain layer and PEFT's LoRA.

snell bench generate [--rank 8 --rank 32] [--shape IN OUT]
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from snell import SnellLinear, refresh_thresholds
from snell.bench.device_timing import Run, ceilings, median_seconds, num_sets, operation_command, report

TOKENS = (1, 4, 16)


def lora(linear: nn.Linear, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    return get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False).base_model.model[0]


@torch.inference_mode()
def measure(m: int, n: int, rank: int, tokens: int, device: str) -> dict[str, Any]:
    sets = num_sets(2 * m * n, device)
    plain = [nn.Linear(n, m, device=device, dtype=torch.bfloat16) for _ in range(sets)]
    with torch.inference_mode(False):
        layers = {
            "plain": plain,
            "lora": [lora(copy.copy(linear), rank) for linear in plain],
            "snell": [SnellLinear.from_linear(copy.copy(linear), rank=rank) for linear in plain],
        }
    for layer in layers["snell"]:
        refresh_thresholds(layer)
    x = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)
    seconds = {
        name: median_seconds([lambda layer=layer: layer(x) for layer in same], device) for name, same in layers.items()
    }
    return {
        "in": n,
        "out": m,
        "rank": rank,
        "tokens": tokens,
        "us": seconds["snell"] * 1e6,
        "to the plain layer": seconds["snell"] / seconds["plain"],
        "to LoRA": seconds["snell"] / seconds["lora"],
        "TB/s": 2 * m * n / seconds["snell"] / 1e12,
    }


@operation_command
def main(run: Run) -> None:
    cases = [(m, n, rank, tokens) for n, m in run.shapes for rank in run.ranks for tokens in TOKENS]
    rows = [measure(*case, run.device) for case in tqdm(cases, desc="generate")]
    report("generate", run, ceilings(run.device), rows)


if __name__ == "__main__":
    main()
