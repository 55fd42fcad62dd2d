"""What the layer benchmark shows: tables and a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from snell.bench.bars import grouped_bars
from snell.bench.footprint import size
from snell.bench.methods import METHODS
from snell.bench.record import markdown

#: The methods whose memory stands in the first table.
SHOWN = ("snell", "lora", "published")


def _name(case: dict[str, Any]) -> str:
    return f"{case['in_features']} x {case['out_features']}, {case['tokens']}"


def table(results: list[dict[str, Any]]) -> str:
    """Times beside the floor, LoRA and the published algorithm, and memory, as a Markdown table."""
    columns = ("in x out, tokens", "dtype", "floor", "SNELL", "of the floor", "PEFT LoRA", "of LoRA", "published")
    columns += ("faster than published", "extra memory: SNELL, LoRA, published", "kept for backward beyond x: the same")
    rows = []
    for case in results:
        methods = case["methods"]

        def ms(name: str, methods: dict[str, Any] = methods) -> str:
            return f"{methods[name]['seconds'] * 1e3:.3g} ms" if "seconds" in methods[name] else "**raises**"

        def sizes(key: str, methods: dict[str, Any] = methods) -> str:
            found = (methods[name].get(key) for name in SHOWN)
            return ", ".join("-" if count is None else size(count) for count in found)

        published = methods["published"].get("snell_over_it")
        row = [_name(case), case["dtype"], ms("floor"), ms("snell"), f"{methods['snell']['ratio_to_floor']:.2f}"]
        row += [ms("lora"), f"{methods['lora']['snell_over_it']:.2f}", ms("published")]
        row += ["" if published is None else f"{1 / published:.1f} x"]
        rows.append([*row, sizes("extra_peak_bytes"), sizes("saved_bytes_beyond_x")])
    return markdown(columns, rows)


def peers(results: list[dict[str, Any]], formats: dict[str, Callable[[Any], str]]) -> str:
    """One row a case and one column a method, each cell the figures of ``formats``, as a Markdown table."""

    def cell(entry: dict[str, Any]) -> str:
        if "error" in entry:
            return "**raises**"
        return ", ".join("-" if entry.get(key) is None else shown(entry[key]) for key, shown in formats.items())

    rows = [
        [_name(case), case["dtype"], *(cell(case["methods"].get(method, {})) for method in METHODS)] for case in results
    ]
    return markdown(("in x out, tokens", "dtype", *(method.label for method in METHODS.values())), rows)


def peer_tables(results: list[dict[str, Any]]) -> str:
    """Time, memory and what is trained, of every method."""
    cost = peers(results, {"ratio_to_lora": lambda ratio: f"{ratio:.2f} x", "extra_peak_bytes": size})
    trained = peers(results, {"trainable": "{:,}".format, "optimizer_bytes": size})
    return (
        f"Every method's time as a multiple of LoRA's, and its extra memory:\n\n{cost}\n\n"
        f"What is trained, and AdamW's state for it:\n\n{trained}"
    )


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    """Time relative to LoRA and extra memory, by case and method; one column of panels a dtype."""
    dtypes = list(dict.fromkeys(case["dtype"] for case in results))
    figure = Figure(figsize=(7.5 * len(dtypes), 7.6), layout="constrained")
    panels = figure.subplots(2, len(dtypes), squeeze=False, sharex="col")
    for dtype, (time, memory) in zip(dtypes, panels.T, strict=True):
        cases = [case for case in results if case["dtype"] == dtype]
        names = [f"{case['in_features']} x {case['out_features']}\n{case['tokens']} tokens" for case in cases]
        ratios, peaks = (
            {method: [case["methods"][method].get(key) for case in cases] for method in METHODS}
            for key in ("ratio_to_lora", "extra_peak_bytes")
        )
        grouped_bars(time, names, ratios, "forward + backward, multiple of LoRA's time")
        time.axhline(1, color="black", linewidth=0.8)
        time.set_title(dtype, loc="left", fontsize=11)
        mebibytes = {method: [peak and peak / 2**20 for peak in values] for method, values in peaks.items()}
        grouped_bars(memory, names, mebibytes, "extra memory of a step, MiB")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(METHODS), frameon=False)
    figure.savefig(path, dpi=130)
