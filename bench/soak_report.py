"""What the soak shows: its tables and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from snell.bench.soak_run import WARM_UP, Soak

__all__ = ["draw", "table"]

COLOUR = "#1f77b4"


def table(document: dict[str, Any]) -> str:
    """Markdown: what held under turmoil, and what kills did to each way of saving and resuming."""
    soak = document["soak"]
    growth = f"{soak['growth_mib']:.1f} MiB, {soak['kib_a_step']:.2f} KiB a step"
    counts = ", ".join(f"{name} {count:,}" for name, count in soak["events"].items())
    rows = [
        "| under turmoil | |",
        "|---|---|",
        f"| training steps | {soak['steps']:,} |",
        f"| events between them | {sum(soak['events'].values()):,}: {counts} |",
        f"| trained factors, largest difference from the quiet runs' | {soak['difference']:g} |",
        f"| base weights, largest difference from those at the start | {soak['base_difference']:g} |",
        f"| live tensors, first and last stop after the warm-up | {_range(soak['live'])} |",
        f"| resident set, growth after the warm-up | {growth} |",
    ]
    if document["kills"]:
        rows += ["", "| way of saving and resuming | kills | left amid a save | what came of it |", "|---|---|---|---|"]
    for kill in document["kills"]:
        amid = "-" if kill["amid_a_save"] is None else kill["amid_a_save"]
        end = "; ".join(kill["problems"]) or f"step {kill['steps']:,} reached, bits equal to the unbroken run's"
        rows.append(f"| {kill['way']} | {kill['kills']} | {amid} | {end} |")
    return "\n".join(rows)


def _range(live: list[list[int]]) -> str:
    warm = live[int(WARM_UP * len(live)) :]
    return " and ".join(f"{count:,} ({size:,} bytes)" for count, size in (warm[0], warm[-1]))


def draw(path: Path, soak: Soak) -> None:
    """The resident set over the steps, and what happened between them."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    memory, events = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, 1))
    resident = [kib / 1024 for kib in soak.resident_kib]
    memory.axvspan(0, WARM_UP * soak.steps, color="0.92", zorder=0)
    memory.text(0.01 * soak.steps, max(resident) + 5, "warm-up", fontsize=9, va="bottom", color="0.4")
    memory.plot(resident, color=COLOUR, linewidth=1.2)
    # A scale on which the bound on growth is an inch or so, whatever the process weighs.
    memory.set_ylim(min(resident) - 10, max(resident) + 10)
    memory.set_ylabel("resident set, MiB")
    memory.set_title(
        f"{soak.steps:,} training steps, {sum(map(len, soak.events.values())):,} random events between them; "
        f"difference from the quiet runs: {soak.difference:g}",
        loc="left",
        fontsize=11,
    )
    names = sorted(soak.events, reverse=True)
    events.eventplot([soak.events[name] for name in names], linelengths=0.7, linewidths=0.5, colors=COLOUR)
    events.set_yticks(range(len(names)), names, fontsize=9)
    events.set_xlabel("training step")
    events.set_xlim(0, soak.steps)
    for axes in (memory, events):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
