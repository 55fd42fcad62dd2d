"""Selective freezing (SAFE) beside the same run without it: memory, products and time over training, and accuracy.

SNELL and LoRA tune the demonstration's network for its target domain, or another task. The two runs take turns step by
step, from one start and on the same batches. What the checks cost is shown beside the time of the steps: it does not
grow with the length of a training. Memory is what a step keeps for backward, gradients and the optimizer's state. FLOPs
are those of a step's products of matrices, where SNELL's gradients of kept entries count as a whole product.

The paper's abstract (arXiv 2412.03587) says -42.85 % memory, -34.59 % computation and -11.82 % time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from snell.bench import digits
from snell.bench.contenders import ADAPT, quiet_libraries
from snell.bench.memory import optimizer_bytes, saved_bytes, trained
from snell.bench.protocol import cosine
from snell.bench.report import Columns, Document, made_by, table, with_error
from snell.training import SelectiveFreezing

METHODS = {"snell": "SNELL", "lora": "PEFT LoRA"}

#: What validation data chose for both methods in ``snell bench demo``.
RATE = 1e-2

#: Checks over a training.
CHECKS = 20


class Task(NamedTuple):
    """What is trained: ``build(method, seed)`` a model, with ``optimizer(model, method)``, on ``batches(seed)``.

    ``accuracy(model)`` is in percent; ``facts`` are told with the results.
    """

    steps: int
    facts: dict[str, Any]
    build: Callable[[str, int], nn.Module]
    optimizer: Callable[[nn.Module, str], torch.optim.Optimizer]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[int], Iterator[Any]]
    calibration: Callable[[int], dict[str, Tensor]]
    accuracy: Callable[[nn.Module], float]


def on_digits(settings: digits.Settings | None = None) -> Task:
    """The demonstration's task."""
    transfer = digits.Transfer(settings)

    def build(method: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        scale = {"scale": None} if method == "snell" else {}
        return ADAPT[method](digits.with_new_head(transfer.pretrained), digits.RANK, head="classifier", **scale).train()

    return Task(
        transfer.settings.steps,
        {"rate": RATE},
        build,
        lambda model, _: digits.optimizer(model, RATE),
        digits.loss,
        lambda seed: digits.batches(transfer.few(seed), seed),
        lambda seed: {"pixel_values": transfer.few(seed).pixels[: digits.BATCH]},
        lambda model: transfer.accuracy(model, "test"),
    )


def flops(step: Callable[[], Tensor]) -> int:
    """Of the products of matrices in a forward and its backward; SNELL's operations count as theirs."""

    def linear(x: Any, weight: Any, bias: Any, A: Any, B: Any, *_: Any, **__: Any) -> int:
        return 2 * torch.Size(x[:-1]).numel() * A[0] * B[0]

    def backward(grad_y: Any, x: Any, weight: Any, needs: Any, A: Any, B: Any, *_: Any, **__: Any) -> int:
        of_input, of_weight, _, of_factors = needs
        return (bool(of_input) + bool(of_weight or of_factors)) * linear(grad_y, weight, None, A, B)

    products = {torch.ops.snell.linear: linear, torch.ops.snell.linear_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        step().backward()
    return counter.get_total_flops()


def costs(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> dict[str, float]:
    """Of a step at this moment, in bytes and floating-point operations."""
    with torch.random.fork_rng():
        kept = saved_bytes(lambda: task.loss(model, batch), model.parameters())
        found = {"flops": flops(lambda: task.loss(model, batch)), "saved_bytes": kept}
    model.zero_grad()
    gradients = sum(parameter.nbytes for parameter in trained(model))
    return {**found, "bytes": kept + gradients + optimizer_bytes(optimizer)}


def beside(task: Task, method: str, seed: int, share: float, tick: Callable[[], Any]) -> dict[str, Any]:
    """A training with freezing and one without, step by step in turns."""
    models = {name: task.build(method, seed) for name in ("plain", "safe")}
    optimizers = {name: task.optimizer(model, method) for name, model in models.items()}
    rates = [cosine(optimizer, task.steps) for optimizer in optimizers.values()]
    settings: dict[str, Any] = {"steps": task.steps, "share": share}
    freezing = SelectiveFreezing(models["safe"], optimizers["safe"], task.calibration(seed), **settings)
    every, seconds, checks = max(1, task.steps // CHECKS), dict.fromkeys(models, 0.0), 0.0
    over: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for i, batch in enumerate(itertools.islice(task.batches(seed), task.steps), 1):
        for name in sorted(models, reverse=bool(i % 2)):
            begin = time.perf_counter()
            task.loss(models[name], batch).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name] += time.perf_counter() - begin
        if i % every == 0:
            begin = time.perf_counter()
            freezing.check(i)
            checks += time.perf_counter() - begin
        for rate in rates:
            rate.step()
        if (i - 1) % every == 0:  # what holds until the next check
            for name, model in models.items():
                over[name].append(costs(task, model, optimizers[name], batch))
        tick()
    facts = {"frozen": freezing.frozen, "adapters": len(freezing.adapters), "check_seconds": checks}
    result: dict[str, Any] = dict(facts)
    for name, model in models.items():
        means = {key: fmean(at[key] for at in over[name]) for key in over[name][0]}
        result[name] = means | {"seconds": seconds[name], "accuracy": task.accuracy(model.eval())}
    return result | {"over": over["safe"]}


def measure(seeds: int, share: float, task: Task | None = None) -> dict[str, Any]:
    """Both methods over all seeds, on the demonstration's task unless another is given."""
    quiet_libraries()
    made = task or on_digits()
    with tqdm(total=len(METHODS) * seeds * made.steps, desc="freezing", unit="step") as bar:
        runs = {m: [beside(made, m, seed, share, bar.update) for seed in range(seeds)] for m in METHODS}
    settings = {"steps": made.steps, "seeds": seeds, "share frozen": share, **made.facts}
    return {"file": "freezing", "settings": settings, "results": [{"method": m, "runs": runs[m]} for m in METHODS]}


def _fall(key: str, more: str = "") -> Callable[[Any], str]:
    def cell(row: Any) -> str:
        ratio = fmean((run["safe"][key] + run.get(more, 0)) / run["plain"][key] for run in row["runs"])
        return f"{100 * (ratio - 1):+.1f} %"

    return cell


def _accuracies(row: Any, name: str) -> list[float]:
    return [run[name]["accuracy"] for run in row["runs"]]


COLUMNS: Columns = [
    ("method", lambda row: METHODS[row["method"]]),
    ("memory", _fall("bytes")),
    ("of it kept for backward", _fall("saved_bytes")),
    ("FLOPs", _fall("flops")),
    ("time of the steps", _fall("seconds")),
    ("with the checks", _fall("seconds", "check_seconds")),
    ("accuracy without, %", lambda row: with_error(_accuracies(row, "plain"))),
    ("with", lambda row: with_error(_accuracies(row, "safe"))),
    (
        "difference",
        lambda row: with_error([run["safe"]["accuracy"] - run["plain"]["accuracy"] for run in row["runs"]], "+"),
    ),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    text = "Means over training, beside the same run without freezing; accuracies with their standard error."
    return f"{table(COLUMNS, document['results'])}\n\n{text}\n\n{made_by(document)}"
