"""A whole training step with SNELL beside PEFT's LoRA, on a small Llama and a small ViT.

    snell bench models [--device cuda]

Both tuners adapt every linear layer of the same random model at the same rank; a step is forward, backward and
the optimizer's update. Ratios are SNELL to LoRA within one run, the steps taking turns; peak memory is over what
the model and the optimizer hold, and saved bytes are what autograd keeps between forward and backward.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm

from snell.bench.measure import extra_peak_bytes, interleaved, median_ratio, saved_bytes
from snell.bench.record import device_option, made_by, out_option, write
from snell.peft import SnellConfig

RANK = 32

Batch = dict[str, torch.Tensor]


def llama() -> tuple[tf.PreTrainedModel, Batch, str]:
    """4 layers of width 512, 2 x 256 tokens."""
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
    tokens = torch.randint(1000, (2, 256))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=1000, **sizes))
    return model, {"input_ids": tokens, "labels": tokens}, "Llama, 4 x 512, 512 tokens"


def vit() -> tuple[tf.PreTrainedModel, Batch, str]:
    """6 layers of width 384 on 4 images of 197 patches."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    model = tf.ViTForImageClassification(tf.ViTConfig(num_labels=10, **sizes))
    return (
        model,
        {"pixel_values": torch.randn(4, 3, 224, 224), "labels": torch.randint(10, (4,))},
        ("ViT, 6 x 384, 4 images"),
    )


CONFIGS = {
    "snell": lambda: SnellConfig(r=RANK, target_modules="all-linear"),
    "lora": lambda: LoraConfig(r=RANK, target_modules="all-linear"),
}


def _step(model: PeftModel, batch: Batch) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(
    build: Callable[[], tuple[tf.PreTrainedModel, Batch, str]], device: str, repetitions: int
) -> dict[str, Any]:
    """One model's figures."""
    torch.manual_seed(0)
    base, batch, name = build()
    batch = {key: value.to(device) for key, value in batch.items()}
    models = {key: get_peft_model(copy.deepcopy(base), make()).to(device).train() for key, make in CONFIGS.items()}
    steps = {key: _step(model, batch) for key, model in models.items()}
    with tqdm(total=repetitions, desc=name) as bar:
        times = dict(zip(steps, interleaved(list(steps.values()), device, repetitions, bar.update), strict=True))
    peak = {key: extra_peak_bytes(step, device) for key, step in steps.items()}
    saved = {key: saved_bytes(lambda m=model: m(**batch).loss, model.parameters()) for key, model in models.items()}
    return {
        "model": name,
        "seconds": {key: statistics.median(seconds) for key, seconds in times.items()},
        "step_ratio": median_ratio(times["snell"], times["lora"]),
        "peak_bytes": peak,
        "saved_bytes": saved,
        "trainable": {key: sum(p.numel() for p in m.parameters() if p.requires_grad) for key, m in models.items()},
    }


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, one row a model."""
    rows = [
        "| model | step, LoRA | step, SNELL | SNELL / LoRA | extra peak / LoRA's | saved for backward / LoRA's |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds, peak, saved = result["seconds"], result["peak_bytes"], result["saved_bytes"]
        memory = "-" if None in peak.values() else f"{peak['snell'] / peak['lora']:.2f}"
        rows.append(
            f"| {result['model']} | {seconds['lora'] * 1e3:.0f} ms | {seconds['snell'] * 1e3:.0f} ms "
            f"| {result['step_ratio']:.2f} | {memory} | {saved['snell'] / saved['lora']:.2f} |"
        )
    return "\n".join(rows)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{table(document['models'])}\n\n{made_by(document)}"


@click.command(help=__doc__)
@device_option
@click.option("--repetitions", type=int, default=9, show_default=True, help="Timed steps of each.")
@out_option
def main(device: str, repetitions: int, out: Path) -> None:
    results = [measure(build, device, repetitions) for build in (llama, vit)]
    click.echo(table(results))
    settings = {"rank": RANK, "sparsity": SnellConfig().sparsity}
    write(out, f"peft-models-{device}", {"settings": settings, "models": results}, benchmark="models", device=device)


if __name__ == "__main__":
    main()
