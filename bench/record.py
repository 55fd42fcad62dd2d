"""What every benchmark's command line shares: its options, and results files that say how they were made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from snell.bench.machine import machine_facts

Command = TypeVar("Command", bound=Callable[..., Any])

#: What a benchmark's name follows on the command line.
PREFIX = "snell bench"


def out_option(command: Command) -> Command:
    """``--out FOLDER``: where the results go."""
    return click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default="out",
        show_default=True,
        help="Results folder.",
    )(command)


def device_option(command: Command) -> Command:
    """``--device cpu|cuda``, refused where the machine has no GPU."""

    def check(_context: click.Context, _parameter: click.Parameter, device: str) -> str:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise click.BadParameter("there is no GPU here that torch can use")
        return device

    return click.option(
        "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, callback=check, help="Where."
    )(command)


def command_line(name: str) -> str:
    """The command that is running, as a reader would type it; where its results go is left out."""
    context = click.get_current_context(silent=True)
    words = [*PREFIX.split(), name] if name != "demo" else ["snell", "demo"]
    for parameter in context.command.params if context else []:
        source = context.get_parameter_source(parameter.name)
        if parameter.name == "out" or source is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[parameter.name]
        for one in value if parameter.multiple else [value]:
            words += [max(parameter.opts, key=len)]
            if not getattr(parameter, "is_flag", False):
                words += [str(part) for part in (one if isinstance(one, tuple) else (one,))]
    return shlex.join(words)


def write(
    out: Path, name: str, document: Mapping[str, Any], *, benchmark: str | None = None, device: str = "cpu"
) -> Path:
    """Write ``out/name.json``: the command (of ``benchmark``, or ``name``), the machine, and the document."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    facts = {"command": command_line(benchmark or name), "machine": machine_facts(device)}
    path.write_text(json.dumps(facts | dict(document), indent=1) + "\n")
    click.echo(f"written: {path}")
    return path


def made_by(document: Mapping[str, Any]) -> str:
    """How a results file was made, as one line of Markdown."""
    machine = document["machine"]
    settings = ", ".join(f"{name} {value}" for name, value in document.get("settings", {}).items())
    where = f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"`{document['command']}`{': ' if settings else ''}{settings}; {where}."


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
