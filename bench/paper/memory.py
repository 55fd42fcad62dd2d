"""The paper's Table A12: memory while LoRA-8 and SNELL-8 train ViT-B/16, ViT-L/16 and ViT-H/14, batch 8.

    snell bench memory [--device cuda] [--method published]

Float32, random weights, AdamW; both adapt the query, key, value, output and MLP layers of the whole encoder.
The parts: all tensors of the model, gradients and AdamW's state, which stay allocated between steps; tensors saved
for backward; and what else a step holds at its peak, such as blocks of SNELL's workspace. That peak is the GPU
allocator's own, and on a CPU the same count from the allocations and frees that torch reports. On a CPU the growth
of the resident set over the same step stands beside it, which also sees the scratch of libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from snell.bench.contenders import SPARSITY, quiet_libraries
from snell.bench.memory import counted_peak_bytes, step_peaks, trained
from snell.bench.names import METHODS, VITS
from snell.bench.report import Columns, Document, Panel, Series, made_by, picture, plain_table, table
from snell.bench.workloads import Training, Workload, vit

RANK, IMAGES = 8, 8

#: SNELL-8's memory over LoRA-8's in Table A12 of arXiv 2411.01800, and what this package is held to.
PAPER = {"ViT-B/16": 1.082, "ViT-L/16": 1.045, "ViT-H/14": 1.039}
TARGET = 1.01

#: The parts of a step's memory, as they are called in a table, and their colours; bottom to top in the picture.
PARTS = {
    "model_bytes": ("model", "#5f6b7a"),
    "optimizer_bytes": ("optimizer state", "#8172b3"),
    "gradient_bytes": ("gradients", "#c44e52"),
    "saved_bytes": ("saved for backward", "#1f77b4"),
    "other_bytes": ("else at the peak", "#e08e45"),
}

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def measure_one(method: str, workload: Workload, device: str) -> dict[str, Any]:
    """Bytes by part and in all, and on a CPU the growth of the resident set; the workload's model is used up."""
    training = Training(method, workload, RANK, keep_gradients=True)
    entry: dict[str, Any] = {**training.held()}
    entry["gradient_bytes"] = sum(p.grad.nbytes for p in trained(training.model) if p.grad is not None)
    entry |= step_peaks(training.step, device)
    entry["other_bytes"] = entry["extra_peak_bytes"] - entry["saved_bytes"]
    return entry | {"total_bytes": sum(entry[part] for part in PARTS)}


def measure(device: str, model: Sequence[str] = (), method: Sequence[str] = (), **sizes: Any) -> dict[str, Any]:
    """The chosen transformers of :data:`VITS`, their sizes changed by ``sizes``."""
    quiet_libraries()
    results: dict[str, dict[str, Any]] = {}
    counted_peak_bytes(lambda: None)  # the profiler's own start is not to be seen in the first model's resident set
    for name, one in tqdm(list(product(model or VITS, dict.fromkeys(("lora", "snell", *method)))), unit="model"):
        torch.manual_seed(0)
        results.setdefault(name, {})[one] = measure_one(one, vit(name, device, IMAGES, **sizes), device)
    settings = {"rank": RANK, "images": IMAGES, "sparsity": SPARSITY}
    return {"file": f"memory-{device}", "settings": settings, "models": results}


def _rows(results: Results) -> list[dict[str, Any]]:
    """A row a model and method, in MiB."""
    rows = []
    for model, methods in results.items():
        for method, entry in methods.items():
            mib = {key: None if count is None else count / 2**20 for key, count in entry.items()}
            of_lora = entry["total_bytes"] / methods["lora"]["total_bytes"]
            rows.append({"model": model, "method": METHODS[method].label, "of_lora": of_lora, **mib})
    return rows


def verdict(results: Results) -> str:
    """SNELL's memory over LoRA's beside the paper's and the target."""
    rows = []
    for model, methods in results.items():
        ratio = methods["snell"]["total_bytes"] / methods["lora"]["total_bytes"]
        rows.append([model, f"{PAPER[model]:.3f}", f"{ratio:.4f}", "yes" if ratio <= TARGET else "**no**"])
    return plain_table(("SNELL-8 over LoRA-8", "paper, Table A12", "here", f"at most {TARGET}"), rows)


COLUMNS: Columns = [
    ("model", "{model}"),
    ("method", "{method}"),
    *((f"{name}, MiB", f"{{{part}:,.1f}}") for part, (name, _) in PARTS.items()),
    ("in all, MiB", "{total_bytes:,.1f}"),
    ("resident set's growth in the step, MiB", "{resident_extra_peak_bytes:,.1f}"),
    ("of LoRA's", "{of_lora:.4f}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    results = document["models"]
    return f"{verdict(results)}\n\n{table(COLUMNS, _rows(results))}\n\n{made_by(document)}"


def draw(path: Path, document: Document) -> None:
    """Bars of the parts, one a model and method."""
    rows = _rows(document["models"])
    bottom, series = [0.0] * len(rows), []
    for part, (name, colour) in PARTS.items():
        heights = [row[part] / 1024 for row in rows]
        series.append(Series(heights, None, name, colour, bars=0.7, bottom=bottom))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    ticks = {i: f"{row['model']}\n{row['method']}\n{row['of_lora']:.3f} of LoRA's" for i, row in enumerate(rows)}
    panel = Panel("rank 8, batch of 8 images, float32, AdamW", series, ylabel="GiB", ticks=ticks)
    picture(path, "Memory of a training step, by part", [[panel]], 2.5 + 1.3 * len(rows), 5.4)
