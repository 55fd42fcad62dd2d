"""The command of every benchmark: its options, and what is done with what it measures.

A benchmark's module has ``measure(**options)``, which returns the results file's contents, ``report(document)`` and,
where there is a picture, ``draw(path, document)``; or ``run(out, **options)`` instead. It is imported when it runs, and
its docstring is the help: so ``--help`` takes as long as ``import snell``.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from snell.bench.names import METHODS, MODELS, VITS
from snell.cli.options import out_option
from snell.kernels.table import TABLE

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _check_device(_context: click.Context, _parameter: click.Parameter, device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("there is no GPU here that torch can use")
    return device


def _one(name: str, kind: Any, default: Any, text: str, **more: Any) -> Decorator:
    return click.option(name, type=kind, default=default, show_default=True, help=text, **more)


def _several(name: str, kind: Any, text: str, default: tuple[Any, ...] = (), **more: Any) -> Decorator:
    return click.option(name, type=kind, multiple=True, default=default, show_default=bool(default), help=text, **more)


def _seconds(default: float, what: str) -> Decorator:
    text = f"Time for each {what}; below 5 each method has one turn."
    return _one("--seconds", click.FloatRange(0, min_open=True), default, text)


_COUNT = click.IntRange(1)
_DEVICES = {"kind": click.Choice(["cpu", "cuda"]), "callback": _check_device}
_WHERE = _one("--device", default="cpu", text="Where.", **_DEVICES)
_REPETITIONS = _one("--repetitions", _COUNT, 5, "Timed steps of each, fewer of slow ones.")
_TILES = (
    _several("--rank", _COUNT, "May be repeated.", (8, 32)),
    _several("--shape", (int, int), "May be repeated; some models' unless given.", metavar="IN OUT"),
)
_ON_GPU = (_one("--device", default="cuda", text="cpu tries the code, and times nothing.", **_DEVICES), *_TILES)
_ALL = "May be repeated; all unless given."

OPTIONS: dict[str, tuple[Decorator, ...]] = {
    "demo": (),
    "layer": (
        _WHERE,
        _seconds(20.0, "case"),
        _one("--runs", _COUNT, 1, "Runs in processes of their own; tables then show medians and ranges."),
    ),
    "models": (
        _WHERE,
        _several("--model", click.Choice(MODELS), _ALL),
        _one("--rank", _COUNT, 32, "Columns of the factors."),
        _REPETITIONS,
    ),
    "red": (
        _WHERE,
        _several("--model", click.Choice(("vit-b", "llama")), _ALL),
        _one("--rank", _COUNT, 32, "Columns of LoRA's factors."),
        _REPETITIONS,
    ),
    "profiles": (
        _several("--adapters", _COUNT, "Adapters of a bank. May be repeated.", (100, 400, 800)),
        _one("--rank", _COUNT, 48, "Columns of an adapter's factors."),
        _one("--profiles", _COUNT, 64, "Profiles that are trained together."),
        _REPETITIONS,
    ),
    "competition": (
        _several("--model", click.Choice(("vit-b", "llama-7b")), _ALL),
        _one("--rank", _COUNT, 32, "Columns of the factors."),
        _REPETITIONS,
    ),
    "operations": (_one("--repetitions", _COUNT, 11, "Timed runs of each."),),
    "growth": (_WHERE, _seconds(6.0, "point")),
    "freezing": (
        _one("--seeds", _COUNT, 5, "Draws of labels, heads and factors."),
        _one("--share", click.FloatRange(0, 1), 0.5, "Share of the adapters that is frozen at the end."),
    ),
    "steps": (_WHERE, _REPETITIONS),
    "memory": (
        _WHERE,
        _several("--model", click.Choice(list(VITS)), _ALL),
        _several("--method", click.Choice(list(METHODS)), "One more method; may be repeated."),
    ),
    "gates": (_one("--workers", _COUNT, 1, "Processes, of a thread each."),),
    "fit": (_one("--steps", _COUNT, 100_000, "Steps of Adam."), _several("--rank", _COUNT, "May be repeated.", (8,))),
    "sparsify": (),
    "matrix-rank": (),
    **dict.fromkeys(("merge", "select", "factor-grad", "generate"), _ON_GPU),
    "resources": (_several("--arch", click.Choice(list(map(str, TABLE))), _ALL),),
    "tune": _TILES,
}


def command(name: str, module: str) -> click.Command:
    """The benchmark ``name`` of that module; the GPU's operations share one, whose ``measure`` takes the name too."""
    spec = importlib.util.find_spec(module)
    help_text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) if spec and spec.origin else None

    def run(out: Path, **settings: Any) -> None:
        from snell.bench.report import publish

        benchmark = importlib.import_module(module)
        if OPTIONS[name] is _ON_GPU:
            settings["operation"] = name
        if hasattr(benchmark, "run"):
            benchmark.run(out, **settings)
        else:
            publish(out, name, benchmark, benchmark.measure(**settings), settings.get("device", "cpu"))

    decorated: Callable[..., Any] = run
    for option in reversed((*OPTIONS[name], out_option)):
        decorated = option(decorated)
    return click.command(name, help=help_text)(decorated)
