"""Forward and backward of one layer: SNELL beside the floor, its peers and the published algorithm.

    snell bench layer [--device cuda]

All methods of a case run in one process and take turns; figures are medians. A method that takes several times the
others' time has fewer turns. Threads are torch's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from snell.bench.footprint import held_tensors
from snell.bench.layer_methods import Case, Contender, Floor
from snell.bench.layer_report import draw, peer_tables, table
from snell.bench.measure import extra_peak_bytes, is_slow, median_ratio, saved_bytes, seconds_of, take_turns
from snell.bench.methods import METHODS, RANK, SPARSITY, quiet_libraries
from snell.bench.record import device_option, made_by, out_option, write

#: in_features, out_features, tokens.
CPU_SHAPES = ((64, 64, 8), (768, 768, 1576), (768, 3072, 1576), (4096, 4096, 512), (4096, 11008, 256))
GPU_SHAPES = ((64, 64, 8), (4096, 4096, 8192), (4096, 11008, 8192), (8192, 28672, 8192))

#: Seconds a case's methods may take in all, between these numbers of repetitions.
BUDGET_SECONDS, FEWEST, MOST = 20.0, 7, 300

#: What each slow method may take of that, and its fewest repetitions.
SLOW_SHARE, SLOW_FEWEST = 0.15, 3


def repetitions_within(budget: float, seconds: float, fewest: int = FEWEST) -> int:
    """How often a round of ``seconds`` fits the budget; an odd number, so that a median is a measurement."""
    return min(max(int(budget / seconds), fewest), MOST) | 1


def repetitions_of_each(budget: float, seconds: Sequence[float]) -> list[int]:
    """How often each method runs, given the time it takes: most of them equally often, the slow ones less."""
    slow = is_slow(seconds)
    counts = [
        repetitions_within(SLOW_SHARE * budget, taken, SLOW_FEWEST) if s else 0
        for taken, s in zip(seconds, slow, strict=True)
    ]
    left = budget - sum(count * taken for count, taken in zip(counts, seconds, strict=True))
    together = repetitions_within(left, sum(taken for taken, s in zip(seconds, slow, strict=True) if not s))
    return [min(count, together) if s else together for count, s in zip(counts, slow, strict=True)]


def run_case(case: Case, budget: float, tick: Callable[[], object]) -> dict[str, Any]:
    """Every method's time, memory and ratios on one case; a method that raises is recorded with its error."""
    x = torch.randn(case.tokens, case.in_features, device=case.device, dtype=case.dtype).requires_grad_()
    grad_y = torch.randn(case.tokens, case.out_features, device=case.device, dtype=case.dtype)
    floor = Floor(case, x, grad_y)
    floor.step()
    result: dict[str, Any] = {
        "in_features": case.in_features,
        "out_features": case.out_features,
        "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "methods": {"floor": {"extra_peak_bytes": extra_peak_bytes(floor.step, case.device)}},
    }
    running: dict[str, Any] = {"floor": floor}
    for method in METHODS:
        try:
            contender = Contender(method, case, x, grad_y)
            contender.step()
        except (RuntimeError, ValueError) as error:
            result["methods"][method] = {"error": str(error).splitlines()[0]}
            continue
        result["methods"][method] = contender.trains() | {
            "extra_peak_bytes": extra_peak_bytes(contender.step, case.device),
            # x is every method's input, so it is named apart: what else a method keeps is its own doing.
            "saved_bytes_beyond_x": saved_bytes(contender.forward, (x, *held_tensors(contender.layer))),
        }
        running[method] = contender
    steps = [contender.step for contender in running.values()]
    counts = repetitions_of_each(budget, [seconds_of(step, case.device) for step in steps])
    seconds = dict(zip(running, take_turns(steps, case.device, counts, tick), strict=True))
    for method, taken in seconds.items():
        entry = result["methods"][method]
        entry["seconds"] = statistics.median(taken)
        entry["repetitions"] = len(taken)
        entry["ratio_to_floor"] = median_ratio(taken, seconds["floor"])
        if method != "floor":
            entry["ratio_to_lora"] = median_ratio(taken, seconds["lora"])
            entry["snell_over_it"] = median_ratio(seconds["snell"], taken)
    return result


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{table(document['cases'])}\n\n{peer_tables(document['cases'])}\n\n{made_by(document)}"


def brief(document: dict[str, Any]) -> str:
    """The first of the report's tables."""
    return f"{table(document['cases'])}\n\n{made_by(document)}"


@click.command(help=__doc__)
@device_option
@click.option("--seconds", type=float, default=BUDGET_SECONDS, show_default=True, help="Time for each case.")
@out_option
def main(device: str, seconds: float, out: Path) -> None:
    shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    run([Case(*shape, dtype, device) for dtype in (torch.float32, torch.bfloat16) for shape in shapes], seconds, out)


def run(cases: Sequence[Case], seconds: float, out: Path) -> None:
    """Measure the cases, all on one device; tables are printed, results and picture go to ``out``."""
    quiet_libraries()
    torch.manual_seed(0)
    results = []
    with tqdm(cases, unit="case") as bar:
        for case in bar:
            bar.set_postfix_str(f"{case} {case.dtype}")
            results.append(run_case(case, seconds, lambda: bar.update(0)))
    click.echo(f"{table(results)}\n\n{peer_tables(results)}")
    settings, device = {"rank": RANK, "sparsity": SPARSITY}, cases[0].device
    path = write(out, f"layer-{device}", {"settings": settings, "cases": results}, benchmark="layer", device=device)
    draw(path.with_suffix(".png"), results)


if __name__ == "__main__":
    main()
