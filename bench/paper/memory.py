"""The paper's Table A12: memory while LoRA-8 and SNELL-8 train ViT-B/16, ViT-L/16 and ViT-H/14, batch 8.

    snell bench memory [--device cuda] [--method published]

Float32, random weights, AdamW; both adapt the query, key, value, output and MLP layers of the whole encoder.
The parts: all tensors of the model, gradients and AdamW's state, which stay allocated between steps; tensors saved
for backward; and what else a step holds at its peak, such as blocks of SNELL's workspace. That peak is the GPU
allocator's own, and on a CPU the same count from the allocations and frees that torch reports. On a CPU the growth
of the resident set over the same step stands beside it, which also sees the scratch of libraries.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from snell.bench.footprint import counted_peak_bytes, step_peaks, trained
from snell.bench.methods import METHODS, SPARSITY, quiet_libraries
from snell.bench.record import device_option, made_by, markdown, out_option, write
from snell.bench.tuned import Tuned
from snell.bench.workloads import VITS, Workload, vit

RANK, IMAGES = 8, 8

#: SNELL-8's memory over LoRA-8's in Table A12 of arXiv 2411.01800, and what this package is held to.
PAPER = {"ViT-B/16": 1.082, "ViT-L/16": 1.045, "ViT-H/14": 1.039}
TARGET = 1.01

#: The parts of a step's memory, as they are called in a table; bottom to top in the picture.
PARTS = {
    "model_bytes": "model",
    "optimizer_bytes": "optimizer state",
    "gradient_bytes": "gradients",
    "saved_bytes": "saved for backward",
    "other_bytes": "else at the peak",
}
COLOURS = ("#5f6b7a", "#8172b3", "#c44e52", "#1f77b4", "#e08e45")


def measure(method: str, workload: Workload, device: str, rank: int) -> dict[str, int | None]:
    """Bytes by part and in all, and on a CPU the growth of the resident set; the workload's model is used up."""
    tuned = Tuned(method, workload.model, workload.batch, rank, keep_gradients=True)
    entry: dict[str, int | None] = {**tuned.held()}
    gradients = sum(parameter.grad.nbytes for parameter in trained(tuned.model) if parameter.grad is not None)
    peaks = step_peaks(tuned.step, device)
    parts = {"gradient_bytes": gradients, "other_bytes": peaks["extra_peak_bytes"] - entry["saved_bytes"]}
    total = sum((entry | parts)[part] for part in PARTS)
    return entry | parts | peaks | {"total_bytes": total}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, one row a model and method."""
    mib = [f"{name}, MiB" for name in (*PARTS.values(), "in all", "resident set's growth in the step")]
    rows = []
    for model, methods in results.items():
        for method, entry in methods.items():
            row = [model, METHODS[method].label]
            for key in (*PARTS, "total_bytes", "resident_extra_peak_bytes"):
                row.append("-" if entry[key] is None else f"{entry[key] / 2**20:,.1f}")
            rows.append([*row, f"{entry['total_bytes'] / methods['lora']['total_bytes']:.4f}"])
    return markdown(("model", "method", *mib, "of LoRA's"), rows)


def verdict(results: dict[str, dict[str, Any]]) -> str:
    """SNELL's memory over LoRA's beside the paper's and the target."""
    rows = []
    for model, methods in results.items():
        ratio = methods["snell"]["total_bytes"] / methods["lora"]["total_bytes"]
        rows.append([model, f"{PAPER[model]:.3f}", f"{ratio:.4f}", "yes" if ratio <= TARGET else "**no**"])
    return markdown(("SNELL-8 over LoRA-8", "paper, Table A12", "here", f"at most {TARGET}"), rows)


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Bars of the parts, one a model and method."""
    bars = [(model, method, entry) for model, methods in results.items() for method, entry in methods.items()]
    figure = Figure(figsize=(2.5 + 1.5 * len(bars), 5.4), layout="constrained")
    axes = figure.subplots()
    bottoms = [0.0] * len(bars)
    for (part, label), colour in zip(PARTS.items(), COLOURS, strict=True):
        heights = [entry[part] / 2**30 for _, _, entry in bars]
        axes.bar(range(len(bars)), heights, 0.7, bottoms, color=colour, label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, (model, _, entry) in enumerate(bars):
        ratio = entry["total_bytes"] / results[model]["lora"]["total_bytes"]
        axes.text(place, bottoms[place], f"{bottoms[place]:.2f} GiB\n{ratio:.3f} of LoRA's", ha="center", va="bottom")
    axes.set_xticks(range(len(bars)), [f"{model}\n{METHODS[method].label}" for model, method, _ in bars])
    axes.set_ylim(0, max(bottoms) * 1.15)
    axes.set_ylabel("memory of a training step, GiB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=130)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    results = document["models"]
    return f"{verdict(results)}\n\n{table(results)}\n\n{made_by(document)}"


def run(
    names: Iterable[str], methods: Iterable[str], device: str, out: Path, **sizes: Any
) -> dict[str, dict[str, Any]]:
    """Measure transformers of :data:`VITS`, their sizes changed by ``sizes``; results and picture go to ``out``."""
    quiet_libraries()
    cases = [(name, method) for name in names for method in dict.fromkeys(("lora", "snell", *methods))]
    results: dict[str, dict[str, Any]] = {}
    counted_peak_bytes(lambda: None)  # the profiler's own start is not to be seen in the first model's resident set
    with tqdm(cases, unit="model") as bar:
        for name, method in bar:
            bar.set_postfix_str(f"{name}, {method}")
            torch.manual_seed(0)
            workload = vit(name, device, IMAGES, **sizes)
            results.setdefault(name, {})[method] = measure(method, workload, device, RANK)
    click.echo(f"{verdict(results)}\n\n{table(results)}")
    settings = {"rank": RANK, "images": IMAGES, "sparsity": SPARSITY}
    path = write(out, f"memory-{device}", {"settings": settings, "models": results}, benchmark="memory", device=device)
    draw(path.with_suffix(".png"), results)
    return results


@click.command(help=__doc__)
@device_option
@click.option("--model", type=click.Choice(list(VITS)), multiple=True, help="May be repeated; all unless given.")
@click.option("--method", type=click.Choice(list(METHODS)), multiple=True, help="One more method; may be repeated.")
@out_option
def main(device: str, model: tuple[str, ...], method: tuple[str, ...], out: Path) -> None:
    run(model or VITS, method, device, out)


if __name__ == "__main__":
    main()
