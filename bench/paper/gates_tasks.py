"""The two tasks that candidates are tried on, each as its settings and the accuracy of one job."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

import torch
import transformers as tf
from torch import nn
from tqdm import tqdm

from snell import SnellLinear
from snell.bench import minilm
from snell.bench.demo import Settings, Transfer
from snell.bench.demo_data import load_domains
from snell.bench.demo_methods import METHODS, RANK, Method, map_backbone
from snell.bench.demo_training import accuracy
from snell.bench.paper.gates import LORA, Candidate, Job, Measure

__all__ = ["TASKS", "digits", "measuring", "text"]

BUILDS = {method.name: method.build for method in METHODS}
TEXT_STEPS = 40

#: ``(candidate, learning rate, draw, part)`` -> accuracy in percent.
Train = Callable[[Candidate, float, int, str], float]


def tunable(candidate: Candidate, pretrained: nn.Module) -> nn.Module:
    """The pre-trained network with a new head and the candidate's updates, as the demonstration builds it."""
    if candidate == LORA:
        return BUILDS["LoRA (PEFT)"](pretrained)
    settings: dict[str, Any] = candidate._asdict()
    return map_backbone(
        BUILDS["linear probe"](pretrained),
        nn.Linear,
        lambda linear: SnellLinear.from_linear(linear, rank=RANK, **settings),
    )


def digits(settings: Settings | None = None) -> tuple[dict[str, Any], Train]:
    """The demonstration's transfer: a draw decides labels, batches, new head and factors."""
    settings = settings or Settings()
    # Their deprecations would break the progress bar up.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transfer = Transfer(load_domains(), settings, tqdm(disable=True))
    parts = {"validation": transfer.domains.target_validation, "test": transfer.domains.target_test}

    def train(candidate: Candidate, rate: float, draw: int, part: str) -> float:
        model = transfer.tuned(Method(candidate.gate, partial(tunable, candidate), ()), rate, draw)
        return accuracy(model, parts[part])

    shown = {"steps": settings.steps, "labels": f"{settings.labels_per_class} a class", "rank and LoRA's alpha": RANK}
    return shown | {name: f"{len(images)} images" for name, images in parts.items()}, train


def text(steps: int = TEXT_STEPS, sizes: tuple[int, ...] = minilm.SIZES) -> tuple[dict[str, Any], Train]:
    """MiniLM on docstrings: a draw decides which half of the training docstrings has labels, new head and factors."""
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    folder = minilm.checkpoint()
    pool, *held_out = minilm.split(tf.AutoTokenizer.from_pretrained(folder), sizes)
    parts = dict(zip(("validation", "test"), held_out, strict=True))
    few = len(pool) // 2

    def train(candidate: Candidate, rate: float, draw: int, part: str) -> float:
        tf.set_seed(draw)
        chosen = torch.randperm(len(pool))[:few].tolist()
        encoder = tf.AutoModel.from_pretrained(folder)
        model = minilm.Classifier(encoder, encoder.config.hidden_size)
        adapted = (
            minilm.adapt("lora", model) if candidate == LORA else minilm.adapt("snell", model, **candidate._asdict())
        )
        [share] = minilm.tune(adapted, rate, steps, [torch.utils.data.Subset(pool, chosen), parts[part]])
        return 100 * share

    shown = {"steps": steps, "labels": f"{few} docstrings", "rank": minilm.RANK, "LoRA's alpha": 2 * minilm.RANK}
    return shown | {name: f"{len(docstrings)} docstrings" for name, docstrings in parts.items()}, train


TASKS = {"digits": digits, "text": text}


@cache
def _task(name: str) -> tuple[dict[str, Any], Train]:
    """The task, prepared once in each process."""
    return TASKS[name]()


def _accuracy(name: str, job: Job) -> float:
    return _task(name)[1](*job)


@contextmanager
def measuring(name: str, workers: int) -> Iterator[tuple[dict[str, Any], Measure]]:
    """The task's settings, and a measure whose jobs are shared among ``workers`` processes of one thread each."""
    # Forked processes would inherit the locks of torch's threads.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def measure(jobs: Sequence[Job]) -> list[float]:
            return list(pool.map(partial(_accuracy, name), jobs))

        yield _task(name)[0], measure
