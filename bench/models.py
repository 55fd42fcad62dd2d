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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from snell.bench.bars import grouped_bars
from snell.bench.footprint import size, step_peaks
from snell.bench.measure import is_slow, median_ratio, seconds_of, take_turns
from snell.bench.methods import METHODS, RANK, SPARSITY, quiet_libraries
from snell.bench.record import device_option, made_by, markdown, out_option, write
from snell.bench.tuned import Tuned
from snell.bench.workloads import MODELS, Workload

#: Timed steps of a method that takes several times as long as the others.
SLOW_REPETITIONS = 2


def measure(
    build: Callable[[str], Workload], device: str, rank: int, repetitions: int, methods: Sequence[str] = tuple(METHODS)
) -> dict[str, Any]:
    """One model's figures by method; a method that raises is recorded with its error."""
    torch.manual_seed(0)
    name, model, batch = build(device)
    result: dict[str, Any] = {"model": name, "methods": {}}
    steps, first = {}, []
    with tqdm(total=len(methods) + repetitions, desc=name, unit="round") as bar:
        for method in methods:
            bar.set_postfix_str(f"memory: {method}")
            try:
                tuned = Tuned(method, copy.deepcopy(model), batch, rank)
                held, taken = tuned.held(), []
                peaks = step_peaks(lambda step=tuned.step, taken=taken: taken.append(seconds_of(step, device)), device)
            except (RuntimeError, ValueError) as error:
                result["methods"][method] = {"error": str(error).splitlines()[0]}
            else:
                result["methods"][method] = held | peaks
                steps[method] = tuned.step
                first += taken
            bar.update()
        bar.set_postfix_str("time")
        counts = [min(repetitions, SLOW_REPETITIONS) if slow else repetitions for slow in is_slow(first)]
        seconds = dict(zip(steps, take_turns(list(steps.values()), device, counts, bar.update), strict=True))
    for method, taken in seconds.items():
        result["methods"][method] |= {
            "seconds": statistics.median(taken),
            "repetitions": len(taken),
            "ratio_to_lora": median_ratio(taken, seconds["lora"]),
        }
    return result


def training_bytes(entry: dict[str, Any]) -> int:
    """All memory of a training step: model, optimizer state and extra peak."""
    return entry["model_bytes"] + entry["optimizer_bytes"] + entry["extra_peak_bytes"]


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, one row a model and method."""
    columns = ("model", "method", "step", "of LoRA's", "all memory, of LoRA's", "extra memory", "resident set's growth")
    columns += ("saved for backward", "trainable", "optimizer state")
    rows = []
    for result in results:
        lora = training_bytes(result["methods"]["lora"])
        for method, entry in result["methods"].items():
            row = [result["model"], METHODS[method].label]
            if "error" in entry:
                rows.append([*row, f"**raises** {entry['error']}", *("" for _ in columns[3:])])
                continue
            row += [f"{entry['seconds']:.3g} s", f"{entry['ratio_to_lora']:.2f}", f"{training_bytes(entry) / lora:.3f}"]
            resident = entry["resident_extra_peak_bytes"]
            row += [size(entry["extra_peak_bytes"]), "-" if resident is None else size(resident)]
            rows.append([*row, size(entry["saved_bytes"]), f"{entry['trainable']:,}", size(entry["optimizer_bytes"])])
    return markdown(columns, rows)


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    """Step time and memory relative to LoRA, by model and method."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    names = [result["model"].replace(", ", "\n", 1) for result in results]
    labels = ("training step, multiple of LoRA's time", "model, optimizer state and step, multiple of LoRA's memory")
    panels = figure.subplots(1, 2)
    for axes, label, figure_of in zip(panels, labels, (lambda e: e["ratio_to_lora"], training_bytes), strict=True):
        heights: dict[str, list[float | None]] = {method: [] for method in results[0]["methods"]}
        for result in results:
            lora = figure_of(result["methods"]["lora"])
            for method, entry in result["methods"].items():
                heights[method].append(None if "error" in entry else figure_of(entry) / lora)
        grouped_bars(axes, names, heights, label)
        axes.axhline(1, color="black", linewidth=0.8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{table(document['models'])}\n\n{made_by(document)}"


def brief(document: dict[str, Any]) -> str:
    """A row a model: every method's step and all its memory, as multiples of LoRA's."""
    shown = [method for method in METHODS if method != "lora"]
    rows = []
    for result in document["models"]:
        lora = result["methods"]["lora"]
        row = [result["model"], f"{lora['seconds']:.3g} s, {size(training_bytes(lora))}"]
        for method in shown:
            entry = result["methods"][method]
            cell = (
                f"{entry['ratio_to_lora']:.2f}, {training_bytes(entry) / training_bytes(lora):.2f}"
                if "seconds" in entry
                else "**raises**"
            )
            row.append(cell)
        rows.append(row)
    columns = ("model", METHODS["lora"].label, *(METHODS[method].label for method in shown))
    return f"{markdown(columns, rows)}\n\n{made_by(document)}"


def run(
    builds: Sequence[Callable[[str], Workload]],
    device: str,
    rank: int,
    repetitions: int,
    out: Path,
    benchmark: str,
    methods: Sequence[str] = tuple(METHODS),
) -> list[dict[str, Any]]:
    """Measure the models; the table is printed, results and picture go to ``out`` under the benchmark's name."""
    quiet_libraries()
    results = [measure(build, device, rank, repetitions, methods) for build in builds]
    click.echo(table(results))
    settings = {"rank": rank, "sparsity": SPARSITY}
    document = {"settings": settings, "models": results}
    path = write(out, f"{benchmark}-{device}", document, benchmark=benchmark, device=device)
    draw(path.with_suffix(".png"), results)
    return results


@click.command(help=__doc__)
@device_option
@click.option("--model", type=click.Choice(list(MODELS)), multiple=True, help="May be repeated; all unless given.")
@click.option("--rank", type=int, default=RANK, show_default=True, help="Columns of the factors.")
@click.option("--repetitions", type=int, default=5, show_default=True, help="Timed steps of each, fewer of slow ones.")
@out_option
def main(device: str, model: tuple[str, ...], rank: int, repetitions: int, out: Path) -> None:
    run([MODELS[name] for name in model or MODELS], device, rank, repetitions, out, "models")


if __name__ == "__main__":
    main()
