"""What a competition over all layers costs: one threshold for a whole model, and a budget beside a training step.

    snell bench competition [--model llama-7b]

The factors are those of every linear layer of a block of ViT-B/16 or Llama-2-7B, as drawn, without a model. "Each layer
by itself" selects one threshold after the other; "together" selects one for all of them
(``SnellConfig(competition="model")``). Extra memory is the peak of the latter over what was held before it, by the
resident set. The budget's row is ``SparsityBudget.update_and_allocate`` of ViT-B/16 beside its training step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from snell import backends, initial
from snell.bench.clock import median_ratio, take_turns
from snell.bench.contenders import SPARSITY, quiet_libraries
from snell.bench.memory import extra_peak_bytes, freed_memory_given_back
from snell.bench.report import Columns, Document, made_by, table
from snell.bench.workloads import Training, Workload, vit_b
from snell.peft.snell.competition import thresholds
from snell.spec import Spec
from snell.training import BudgetSchedule, SparsityBudget
from snell.update import Parameters


def _blocks(count: int, width: int, inner: int, wide: int) -> list[tuple[int, int]]:
    """``(m, n)`` of the layers: four of attention, ``wide`` to the inner width and one back."""
    return count * (4 * [(width, width)] + wide * [(inner, width)] + [(width, inner)])


#: Shapes of all adapted layers.
SHAPES = {"vit-b": ("ViT-B/16", _blocks(12, 768, 3072, 1)), "llama-7b": ("Llama-2-7B", _blocks(32, 4096, 11008, 2))}


def _layers(shapes: Sequence[tuple[int, int]], rank: int) -> list[Parameters]:
    torch.manual_seed(0)
    spec, found = Spec(rank, SPARSITY), []
    for m, n in shapes:
        A, B, theta = torch.empty(n, rank), torch.empty(m, rank), torch.empty(spec.num_theta)
        initial.draw(A, B, theta, spec, 1.0)
        found.append((A, B, theta, spec))
    return found


def compete(shapes: Sequence[tuple[int, int]], rank: int, repetitions: int) -> dict[str, Any]:
    """Seconds of both ways to select, their ratio within a round, and the extra memory of selecting together."""
    layers = _layers(shapes, rank)

    def alone() -> None:
        for A, B, theta, spec in layers:
            backends.of(A).select(A, B, theta, spec, spec.num_zeroed(len(A) * len(B)), None)

    def together() -> None:
        thresholds(layers, SPARSITY)

    alone()
    together()
    with freed_memory_given_back():
        memory = extra_peak_bytes(together, "cpu")
    seconds = take_turns({"alone": alone, "together": together}, "cpu", repetitions)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratio = median_ratio(seconds["together"], seconds["alone"])
    return {
        "layers": len(shapes),
        "entries": sum(m * n for m, n in shapes),
        "seconds": medians,
        "ratio": ratio,
        "extra_peak_bytes": memory,
    }


def budget(workload: Workload, rank: int, repetitions: int) -> dict[str, float]:
    """Seconds of a training step and of what a budget adds to it."""
    training = Training("snell", workload, rank, keep_gradients=True)
    # Allocations at every step, as long as the measurement lasts.
    budget = SparsityBudget(training.model, BudgetSchedule(0.5, SPARSITY, total=10 * repetitions + 10))
    steps = iter(range(1, 10 * repetitions + 10))
    turns = {"step": training.step, "budget": lambda: budget.update_and_allocate(next(steps))}
    for turn in turns.values():
        turn()
    seconds = take_turns(turns, "cpu", repetitions)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return medians | {"share": median_ratio(seconds["budget"], seconds["step"])}


def measure(model: Sequence[str], rank: int, repetitions: int) -> dict[str, Any]:
    """The chosen models, both unless given."""
    quiet_libraries()
    rows = [{"model": SHAPES[name][0], **compete(SHAPES[name][1], rank, repetitions)} for name in model or SHAPES]
    settings = {"rank": rank, "sparsity": SPARSITY}
    return {
        "file": "competition-cpu",
        "settings": settings,
        "rows": rows,
        "budget": budget(vit_b("cpu"), rank, repetitions),
    }


COLUMNS: Columns = [
    ("model", "{model}"),
    ("layers", "{layers}"),
    ("entries", "{entries:,}"),
    ("each layer by itself", "{seconds[alone]:s}"),
    ("together", "{seconds[together]:s}"),
    ("ratio", "{ratio:.2f}"),
    ("extra memory", "{extra_peak_bytes:size}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    found = document["budget"]
    sentence = (
        f"A budget's update and allocation over ViT-B/16 take {1e3 * found['budget']:.2g} ms, "
        f"{100 * found['share']:.2g} % of a training step of 8 images ({found['step']:.2g} s)."
    )
    return f"{table(COLUMNS, document['rows'])}\n\n{sentence}\n\n{made_by(document)}"
