"""A whole training step of transformers models: SNELL beside its peers and the published algorithm.

    snell bench models [--device cuda] [--model vit-b] [--rank 8]

ViT-B/16, BERT-base and a Llama shape scaled to the machine, with random weights. Every method adapts the same
linear layers, all but the output's, at the same rank; full fine-tuning trains all weights. A step is forward,
backward and AdamW's update. Ratios are to PEFT's LoRA within one round of steps that take turns. Extra memory is a
step's peak over what model and optimizer hold, as torch's allocator counts it, gradients included; on a CPU the
growth of the resident set stands beside it. Saved bytes are what autograd keeps between forward and backward.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from snell.bench.clock import median_ratio, seconds_of, slow, take_turns
from snell.bench.contenders import SPARSITY, quiet_libraries
from snell.bench.memory import step_peaks
from snell.bench.names import METHODS
from snell.bench.report import Columns, Document, Panel, dots, fill, made_by, picture, raised, table
from snell.bench.workloads import MODELS, Training, Workload

#: Timed steps of a method that takes several times as long as the others.
SLOW_REPETITIONS = 2


def measure_model(
    build: Callable[[str], Workload], device: str, rank: int, repetitions: int, methods: Iterable[str] = METHODS
) -> dict[str, Any]:
    """One model's figures by method; a method that raises is recorded with its error."""
    torch.manual_seed(0)
    workload = build(device)
    found, steps, first = {}, {}, {}
    for method in tqdm(methods, desc=f"{workload.name}: memory", unit="method"):
        taken: list[float] = []
        try:
            training = Training(method, workload._replace(model=copy.deepcopy(workload.model)), rank)
            found[method], step = training.held(), training.step
            found[method] |= step_peaks(lambda step=step, taken=taken: taken.append(seconds_of(step, device)), device)
            steps[method], first[method] = step, taken[0]
        except (RuntimeError, ValueError) as error:
            found[method] = {"error": str(error).splitlines()[0]}
    counts = {name: min(repetitions, SLOW_REPETITIONS if name in slow(first) else repetitions) for name in steps}
    with tqdm(total=repetitions, desc=f"{workload.name}: time", unit="round") as bar:
        seconds = take_turns(steps, device, counts, bar.update)
    for method, taken in seconds.items():
        found[method] |= {"seconds": statistics.median(taken), "repetitions": len(taken)}
        found[method]["ratio_to_lora"] = median_ratio(taken, seconds["lora"])
    return {"model": workload.name, "methods": found}


def measure(device: str, rank: int, repetitions: int, model: Sequence[str], **more: Any) -> dict[str, Any]:
    """The chosen models, all unless given."""
    quiet_libraries()
    results = [measure_model(MODELS[name], device, rank, repetitions, **more) for name in model or MODELS]
    return {"file": f"models-{device}", "settings": {"rank": rank, "sparsity": SPARSITY}, "models": results}


def training_bytes(entry: dict[str, Any]) -> int:
    """All memory of a training step: model, optimizer state and extra peak."""
    return entry["model_bytes"] + entry["optimizer_bytes"] + entry["extra_peak_bytes"]


def _compared(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each method's entry with its name and its memory as a multiple of LoRA's."""
    lora = training_bytes(result["methods"]["lora"])
    return {
        method: {"model": result["model"], "method": METHODS[method].label, **entry}
        | ({} if "error" in entry else {"all_bytes": training_bytes(entry), "of_lora": training_bytes(entry) / lora})
        for method, entry in result["methods"].items()
    }


COLUMNS: Columns = [
    ("model", "{model}"),
    ("method", "{method}"),
    ("step", lambda row: fill("**raises** {error}" if "error" in row else "{seconds:s}", row)),
    ("of LoRA's", "{ratio_to_lora:.2f}"),
    ("all memory, of LoRA's", "{of_lora:.3f}"),
    ("extra memory", "{extra_peak_bytes:size}"),
    ("resident set's growth", "{resident_extra_peak_bytes:size}"),
    ("saved for backward", "{saved_bytes:size}"),
    ("trainable", "{trainable:,}"),
    ("optimizer state", "{optimizer_bytes:size}"),
]


def tables(document: Document) -> str:
    """One row a model and method."""
    return table(COLUMNS, (row for result in document["models"] for row in _compared(result).values()))


def report(document: Document) -> str:
    """The results file as Markdown."""
    return f"{tables(document)}\n\n{made_by(document)}"


def brief(document: Document) -> str:
    """A row a model: every method's step and all its memory, as multiples of LoRA's."""
    columns: Columns = [("model", lambda row: row["lora"]["model"])]
    columns.append((METHODS["lora"].label, "{lora[seconds]:s}, {lora[all_bytes]:size}"))
    cell = raised("{ratio_to_lora:.2f}, {of_lora:.2f}")
    measured = document["models"][0]["methods"]  # an older file may lack a method
    others = (method for method in METHODS if method != "lora" and method in measured)
    columns += [(METHODS[method].label, lambda row, method=method: cell(row[method])) for method in others]
    return f"{table(columns, map(_compared, document['models']))}\n\n{made_by(document)}"


def draw(path: Path, document: Document) -> None:
    """Step time and memory relative to LoRA, by model and method."""
    groups = [_compared(result) for result in document["models"]]
    style = {"ticks": {i: group["lora"]["model"].replace(", ", "\n", 1) for i, group in enumerate(groups)}}
    style |= {"log": "y", "level": 1}
    time = Panel("time of a step", dots(groups, lambda entry: entry["ratio_to_lora"]), **style)
    memory = Panel("memory of model, optimizer and step", dots(groups, lambda entry: entry["of_lora"]), **style)
    picture(path, "A whole training step, as a multiple of LoRA's (lower is better)", [[time, memory]])
