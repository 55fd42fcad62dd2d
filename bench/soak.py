"""Training under turmoil and under kills, beside training that nothing happens to.

    snell bench soak [--steps 2000] [--kills 50]

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

from snell.bench.kill import Outcome, kill_plain, kill_trainer, newest_folder
from snell.bench.record import made_by, out_option, write
from snell.bench.soak_report import draw, table
from snell.bench.soak_run import Soak, soak

#: Of the resident sets, every how many steps one is written down.
RECORDED = 20


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    return f"{table(document)}\n\n{made_by(document)}"


def _document(result: Soak, outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    return {
        "settings": {"seed": seed},
        "soak": {
            "steps": result.steps,
            "events": {name: len(steps) for name, steps in sorted(result.events.items())},
            "difference": result.difference,
            "base_difference": result.base_difference,
            "live": result.live,
            "growth_mib": result.growth_mib(),
            "kib_a_step": result.kib_a_step(),
            "resident_kib": result.resident_kib[RECORDED - 1 :: RECORDED],
            "losses": result.losses[RECORDED - 1 :: RECORDED],
        },
        "kills": [outcome.document() for outcome in outcomes],
    }


@click.command(help=__doc__)
@click.option("--steps", type=click.IntRange(min=100), default=2000, show_default=True, help="Training steps.")
@click.option(
    "--kills", type=click.IntRange(min=0), default=50, show_default=True, help="Kills of each way of saving; 0: none."
)
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
    document = _document(result, [*held, *shown], seed)
    click.echo(table(document))
    write(out, "soak", document)
    draw(out / "soak.png", result)
    problems = result.problems() + [f"{one.way}: {problem}" for one in held for problem in one.problems]
    if problems:
        raise click.ClickException("; ".join(problems))


if __name__ == "__main__":
    main()
