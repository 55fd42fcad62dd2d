"""Training under random adapter events and under kills, beside training that nothing happens to.

    python -m tests.stress [--steps 2000] [--kills 50]

A small Llama carries two adapters that are trained by turns. Between steps other adapters are added, loaded, deleted,
switched, merged, unmerged, disabled, mixed and saved at random; at the end the trained factors must have the bits of
runs in which each was trained alone, the base weights those of the start, and memory must have stayed flat. Then
trainings are killed (SIGKILL) at random moments, half of them on a random line of a save, and resumed. Fails, and
says which property does not hold, where one does not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from snell.bench import report
from snell.cli.options import out_option
from tests.stress.kill import Outcome, kill_plain, kill_trainer, newest_folder
from tests.stress.soak import Soak, soak


def tables(result: Soak, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """What held under random events, and what kills did to each way of saving and resuming."""
    counts = ", ".join(f"{name} {len(steps):,}" for name, steps in sorted(result.events.items()))
    live = " and ".join(f"{count:,} ({size:,} bytes)" for count, size in (result.warm()[0], result.warm()[-1]))
    growth = f"{result.growth_mib():.1f} MiB, {result.kib_a_step():.2f} KiB a step"
    rows = {
        "training steps": f"{result.steps:,}",
        "events between them": f"{sum(map(len, result.events.values())):,}: {counts}",
        "trained factors, largest difference from the quiet runs'": f"{result.difference:g}",
        "base weights, largest difference from those at the start": f"{result.base_difference:g}",
        "live tensors, first and last stop after the warm-up": live,
        "resident set, growth after the warm-up": growth,
    }
    found = [{"columns": ["random events", ""], "rows": list(rows.items())}]
    if outcomes:
        columns = ["way of saving and resuming", "kills", "left amid a save", "what came of it"]
        found.append({"columns": columns, "rows": [outcome.cells() for outcome in outcomes]})
    return found


@click.command(help=__doc__)
@click.option("--steps", type=click.IntRange(min=100), default=2000, show_default=True, help="Training steps.")
@click.option("--kills", type=click.IntRange(min=0), default=50, show_default=True, help="Kills of each way of saving.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of data, events and kills.")
@out_option
def main(steps: int, kills: int, seed: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = soak(steps, folder / "soak", seed)
        held, shown = [], []
        if kills:
            held = [kill_trainer(folder / "trainer", kills, seed), kill_plain(folder / "plain", kills, seed)]
            # What users have without these two functions: shown, and no failure of ours.
            shown = [
                kill_trainer(folder / "newest", kills, seed, resume=newest_folder),
                kill_plain(folder / "in place", kills, seed, save="save_pretrained"),
            ]
    document = {"settings": {"seed": seed}, "tables": tables(result, [*held, *shown])}
    report.publish(out, "soak", report, document, program="python -m tests.stress")
    problems = result.problems() + [f"{one.way}: {problem}" for one in held for problem in one.problems]
    if problems:
        raise click.ClickException("; ".join(problems))


if __name__ == "__main__":
    main()
