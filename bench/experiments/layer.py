"""Forward and backward of one layer: SNELL beside the floor, its peers and the published algorithm.

    snell bench layer [--device cuda] [--runs 3]

All methods of a case run in one process and take turns; figures are medians. A method that takes several times the
others' time has fewer turns. Threads are torch's. With several runs, each in a process of its own, figures are medians
over them, and times have their range.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from snell.bench import core, memory
from snell.bench.clock import Step, median_ratio, seconds_of, take_turns, turns_of_each
from snell.bench.contenders import RANK, SPARSITY, one_layer, quiet_libraries
from snell.bench.names import METHODS
from snell.bench.report import Cell, Columns, Document, Panel, dots, made_by, picture, raised, table
from snell.bench.runs import spread, together

#: in_features, out_features, tokens.
SHAPES = {
    "cpu": ((64, 64, 8), (768, 768, 1576), (768, 3072, 1576), (4096, 4096, 512), (4096, 11008, 256)),
    "cuda": ((64, 64, 8), (4096, 4096, 8192), (4096, 11008, 8192), (8192, 28672, 8192)),
}


class Case(NamedTuple):
    """One layer and one batch of activations."""

    in_features: int
    out_features: int
    tokens: int
    dtype: torch.dtype
    device: str


def floor_step(x: Tensor, weight: Tensor, grad_y: Tensor) -> Step:
    """The products that any method with a nonlinear merge must do, by plain matmul: x W^T, dY W and dY^T X."""
    x = x.detach()
    return lambda: (x @ weight.T, grad_y @ weight, grad_y.T @ x)


class Layers:
    """Forward and backward through a module; in every step thresholds are selected anew, as after an update."""

    def __init__(self, module: nn.Module, x: Tensor, grad_y: Tensor) -> None:
        self.module, self.x, self.grad_y = module, x, grad_y
        self.inputs = (x, *memory.trained(module))

    def forward(self) -> Tensor:
        return self.module(self.x)

    def step(self) -> None:
        core.forget()
        torch.autograd.grad(self.forward(), self.inputs, self.grad_y)

    def holds(self) -> dict[str, int]:
        """How many numbers are trained, the bytes of AdamW's state for them, and what backward keeps beyond x."""
        state = memory.optimizer_bytes(memory.adamw(self.module, 0.0))
        self.module.zero_grad()
        saved = memory.saved_bytes(self.forward, (self.x, *memory.held_tensors(self.module)))
        trainable = memory.num_trained(self.module)
        return {"trainable": trainable, "optimizer_bytes": state, "saved_bytes_beyond_x": saved}


def _first_steps(step: Step, device: str, budget: float) -> tuple[float, int | None]:
    """Seconds and extra peak of a warm step; of the first one where that takes longer than the budget."""
    taken: list[float] = []
    peak = memory.extra_peak_bytes(lambda: taken.append(seconds_of(step, device)), device)
    if taken[0] <= budget:
        peak = memory.extra_peak_bytes(lambda: taken.append(seconds_of(step, device)), device)
    return taken[-1], peak


def measure_case(case: Case, budget: float) -> dict[str, Any]:
    """Every method's time, memory and ratios on one case; a method that raises is recorded with its error."""
    n, m, tokens, dtype, device = case
    options = {"device": device, "dtype": dtype}
    x, grad_y = torch.randn(tokens, n, **options).requires_grad_(), torch.randn(tokens, m, **options)
    steps, first, methods = {}, {}, {}
    for method in ("floor", *METHODS):
        try:
            if method == "floor":
                layer, step = None, floor_step(x, torch.randn(m, n, **options), grad_y)
            else:
                layer = Layers(one_layer(method, nn.Linear(n, m, **options)), x, grad_y)
                step = layer.step
            first[method], peak = _first_steps(step, device, budget)
            methods[method] = {"extra_peak_bytes": peak} | (layer.holds() if layer else {})
            steps[method] = step
        except (RuntimeError, ValueError) as error:
            methods[method] = {"error": str(error).splitlines()[0]}
    # A step longer than the whole budget is not repeated.
    seconds = {name: [taken] for name, taken in first.items() if taken > budget}
    again = {name: taken for name, taken in first.items() if name not in seconds}
    seconds |= take_turns({name: steps[name] for name in again}, device, turns_of_each(budget, again)) if again else {}
    for method in steps:
        taken, entry = seconds[method], methods[method]
        entry |= {"seconds": statistics.median(taken), "repetitions": len(taken)}
        entry["ratio_to_floor"] = median_ratio(taken, seconds["floor"])
        if method != "floor":
            entry["ratio_to_lora"] = median_ratio(taken, seconds["lora"])
            entry["snell_over_it"] = median_ratio(seconds["snell"], taken)
    sizes = {"in_features": n, "out_features": m, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    return {**sizes, "methods": methods}


def measure(device: str, seconds: float, cases: Sequence[Case] | None = None, runs: int = 1) -> dict[str, Any]:
    """All cases of the device."""
    if runs > 1:
        found = together(runs, "bench", "layer", "--device", device, "--seconds", str(seconds))
        return {"file": f"layer-{device}", "settings": {**found["settings"], "runs": runs}, "cases": found["cases"]}
    quiet_libraries()
    torch.manual_seed(0)
    dtypes = torch.float32, torch.bfloat16
    cases = cases or [Case(*shape, dtype, device) for dtype in dtypes for shape in SHAPES[device]]
    found = [measure_case(case, seconds) for case in tqdm(cases, unit="case")]
    return {"file": f"layer-{device}", "settings": {"rank": RANK, "sparsity": SPARSITY}, "cases": found}


_CASE: Columns = [("in x out, tokens", "{in_features} x {out_features}, {tokens}"), ("dtype", "{dtype}")]


def _of(method: str, cell: Cell) -> Cell:
    shown = raised(cell)
    return lambda case: shown(case["methods"][method])


def _peers(cell: Cell, document: Document) -> Columns:
    measured = document["cases"][0]["methods"]  # an older file may lack a method
    return [*_CASE, *((shown.label, _of(method, cell)) for method, shown in METHODS.items() if method in measured)]


def _for_three(field: str) -> str:
    return ", ".join(f"{{methods[{method}][{field}]:size}}" for method in ("snell", "lora", "published"))


COLUMNS: Columns = [
    *_CASE,
    ("floor", "{methods[floor][seconds]:ms}"),
    ("SNELL", _of("snell", "{seconds:ms}")),
    ("of the floor", lambda case: spread(case["methods"]["snell"], "ratio_to_floor")),
    ("PEFT LoRA", _of("lora", "{seconds:ms}")),
    ("of LoRA", lambda case: spread(case["methods"]["lora"], "snell_over_it")),
    ("published", _of("published", "{seconds:ms}")),
    ("faster than published", _of("published", lambda entry: f"{1 / entry['snell_over_it']:.1f} x")),
    ("extra memory: SNELL, LoRA, published", _for_three("extra_peak_bytes")),
    ("kept for backward beyond x: the same", _for_three("saved_bytes_beyond_x")),
]


#: SNELLA's kernel function beside the published algorithm.
MIXTURE: Columns = [
    *_CASE,
    ("mixture", _of("mixture", "{seconds:ms}")),
    ("of the floor", _of("mixture", lambda entry: spread(entry, "ratio_to_floor"))),
    ("published SNELLA", _of("published-mixture", "{seconds:ms}")),
    ("of the floor", _of("published-mixture", "{ratio_to_floor:.2f}")),
    (
        "extra memory: mixture, published SNELLA",
        "{methods[mixture][extra_peak_bytes]:size}, {methods[published-mixture][extra_peak_bytes]:size}",
    ),
]


def brief(document: Document) -> str:
    """The first of the report's tables."""
    return f"{table(COLUMNS, document['cases'])}\n\n{made_by(document)}"


def report(document: Document) -> str:
    """The results file as Markdown."""
    cost = table(_peers("{ratio_to_lora:.2f} x, {extra_peak_bytes:size}", document), document["cases"])
    trained = table(_peers("{trainable:,}, {optimizer_bytes:size}", document), document["cases"])
    of_mixture = ""
    if "mixture" in document["cases"][0]["methods"]:
        of_mixture = f"\n\nSNELLA's kernel function:\n\n{table(MIXTURE, document['cases'])}"
    return (
        f"{table(COLUMNS, document['cases'])}{of_mixture}\n\n"
        "Every method's time as a multiple of LoRA's, and its extra memory:\n\n"
        f"{cost}\n\nWhat is trained, and AdamW's state for it:\n\n{trained}\n\n{made_by(document)}"
    )


def draw(path: Path, document: Document) -> None:
    """Time relative to LoRA and extra memory, by case and method; one column of panels a dtype."""

    def column(dtype: str) -> Iterator[Panel]:
        cases = [case for case in document["cases"] if case["dtype"] == dtype]
        ticks = {i: f"{c['in_features']} x {c['out_features']}\n{c['tokens']} tokens" for i, c in enumerate(cases)}
        methods = [case["methods"] for case in cases]
        times = dots(methods, lambda entry: entry["ratio_to_lora"])
        yield Panel(f"{dtype}: time, multiple of LoRA's", times, log="y", ticks=ticks, level=1)
        peaks = dots(methods, lambda entry: entry["extra_peak_bytes"] / 2**20)
        yield Panel(f"{dtype}: extra memory of a step, MiB", peaks, log="y", ticks=ticks)

    columns = [column(dtype) for dtype in dict.fromkeys(case["dtype"] for case in document["cases"])]
    rows = list(zip(*columns, strict=True))
    picture(path, "Forward and backward of one layer, by method (lower is better)", rows, 7.2, 3.8)
