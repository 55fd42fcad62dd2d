"""A group whose commands are imported when they run, so that help is quick and an extra is asked for by its user."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

#: Module and one line of help by command, under the heading of each section of the help.
Sections = Mapping[str, Mapping[str, tuple[str, str]]]


class LazyGroup(click.Group):
    """Commands named in ``sections``; each module's ``main`` is the command."""

    def __init__(self, *args: Any, sections: Sections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self.modules = {name: module for rows in sections.values() for name, (module, _) in rows.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.modules, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.modules:
            return super().get_command(ctx, cmd_name)
        module = self.modules[cmd_name]
        try:
            command: click.Command = importlib.import_module(module).main
        except ImportError as error:
            missing = _missing(error)
            if missing is None:
                raise
            extra = "bench" if module.startswith("snell.bench") else "cli"
            raise click.ClickException(
                f"{ctx.command_path} {cmd_name} needs {missing}, which is not installed: pip install 'snell[{extra}]'"
            ) from error
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.filename is None:
                raise
            # A folder that cannot be written, a full disk: no fault of the program's.
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = {
            heading: [(name, text) for name, (_, text) in rows.items()] for heading, rows in self.sections.items()
        }
        for name in super().list_commands(ctx):
            command = super().get_command(ctx, name)
            if command is not None:
                next(iter(sections.values())).append((name, command.get_short_help_str(limit=1000)))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _missing(error: ImportError) -> str | None:
    """The package outside snell that an import did not find; None where that is not why it failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and not (cause.name or "snell").startswith("snell"):
            return cause.name
        cause = cause.__cause__
    return None
