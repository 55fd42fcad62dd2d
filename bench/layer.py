"""Forward and backward of one layer: SNELL beside the floor, PEFT's LoRA and the published algorithm.

    snell bench layer [--device cuda]

All methods of a case run in one process and take turns; figures are medians. Threads are torch's.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from snell.bench.layer_methods import LAYERS, RANK, SPARSITY, Case, Contender, Floor
from snell.bench.measure import extra_peak_bytes, interleaved, median_ratio, saved_bytes
from snell.bench.record import device_option, made_by, out_option, write

#: in_features, out_features, tokens.
CPU_SHAPES = ((64, 64, 8), (768, 768, 1576), (768, 3072, 1576), (4096, 4096, 512), (4096, 11008, 256))
GPU_SHAPES = ((64, 64, 8), (4096, 4096, 8192), (4096, 11008, 8192), (8192, 28672, 8192))

#: Seconds a case's methods may take in all, between these numbers of repetitions.
BUDGET_SECONDS, FEWEST, MOST = 20.0, 7, 300


def repetitions_within(budget: float, seconds: float) -> int:
    """How often a round of ``seconds`` fits the budget; an odd number, so that a median is a measurement."""
    return min(max(int(budget / seconds), FEWEST), MOST) | 1


def run_case(case: Case, budget: float, tick: Any) -> dict[str, Any]:
    """Every method's time, memory and ratios on one case; a method that raises is recorded with its error."""
    x = torch.randn(case.tokens, case.in_features, device=case.device, dtype=case.dtype).requires_grad_()
    grad_y = torch.randn(case.tokens, case.out_features, device=case.device, dtype=case.dtype)
    floor = Floor(case, x, grad_y)
    result: dict[str, Any] = {
        "in_features": case.in_features,
        "out_features": case.out_features,
        "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "methods": {"floor": {"extra_peak_bytes": extra_peak_bytes(floor.step, case.device)}},
    }
    running: dict[str, Any] = {"floor": floor}
    for method in LAYERS:
        contender = Contender(method, case, x, grad_y)
        try:
            contender.step()
        except RuntimeError as error:
            result["methods"][method] = {"error": str(error).splitlines()[0]}
            continue
        held = (x, *contender.layer.parameters())
        result["methods"][method] = {
            "extra_peak_bytes": extra_peak_bytes(contender.step, case.device),
            # x is every method's input, so it is named apart: what else a method keeps is its own doing.
            "saved_bytes_beyond_x": saved_bytes(contender.forward, held),
        }
        running[method] = contender
    steps = [contender.step for contender in running.values()]
    (round_seconds,) = zip(*interleaved(steps, case.device, 1, lambda: None), strict=True)
    seconds = interleaved(steps, case.device, repetitions_within(budget, sum(round_seconds)), tick)
    for method, taken in zip(running, seconds, strict=True):
        entry = result["methods"][method]
        entry["seconds"] = statistics.median(taken)
        entry["repetitions"] = len(taken)
        entry["ratio_to_floor"] = median_ratio(taken, seconds[0])
        if method != "floor":
            entry["snell_over_it"] = median_ratio(seconds[list(running).index("snell")], taken)
    return result


def _size(count: int) -> str:
    if count < 2**10:
        return f"{count} B"
    return f"{count / 2**10:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def table(results: list[dict[str, Any]]) -> str:
    """The cases as a Markdown table."""
    columns = ("in x out, tokens", "dtype", "floor", "SNELL", "of the floor", "PEFT LoRA", "of LoRA", "published")
    columns += ("faster than published", "extra memory: SNELL, LoRA, published", "kept for backward beyond x: the same")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for case in results:
        methods = case["methods"]

        def ms(name: str, methods: dict[str, Any] = methods) -> str:
            return f"{methods[name]['seconds'] * 1e3:.3g} ms" if "seconds" in methods[name] else "**raises**"

        def sizes(key: str, methods: dict[str, Any] = methods) -> str:
            found = (methods[name].get(key) for name in LAYERS)
            return ", ".join("-" if size is None else _size(size) for size in found)

        published = methods["published"].get("snell_over_it")
        lines.append(
            f"| {case['in_features']} x {case['out_features']}, {case['tokens']} | {case['dtype']} | {ms('floor')} "
            f"| {ms('snell')} | {methods['snell']['ratio_to_floor']:.2f} | {ms('lora')} "
            f"| {methods['lora']['snell_over_it']:.2f} | {ms('published')} "
            f"| {'' if published is None else f'{1 / published:.1f} x'} | {sizes('extra_peak_bytes')} "
            f"| {sizes('saved_bytes_beyond_x')} |"
        )
    return "\n".join(lines)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{table(document['cases'])}\n\n{made_by(document)}"


@click.command(help=__doc__)
@device_option
@click.option("--seconds", type=float, default=BUDGET_SECONDS, show_default=True, help="Time for each case.")
@out_option
def main(device: str, seconds: float, out: Path) -> None:
    torch.manual_seed(0)
    shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    results = []
    cases = [Case(*shape, dtype, device) for dtype in (torch.float32, torch.bfloat16) for shape in shapes]
    with tqdm(cases, unit="case") as bar:
        for case in bar:
            bar.set_postfix_str(f"{case} {case.dtype}")
            results.append(run_case(case, seconds, bar.refresh))
    click.echo(table(results))
    settings = {"rank": RANK, "sparsity": SPARSITY}
    write(out, f"layer-{device}", {"settings": settings, "cases": results}, benchmark="layer", device=device)


if __name__ == "__main__":
    main()
