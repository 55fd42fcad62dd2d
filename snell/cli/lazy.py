"""A group whose commands are imported when they are called: help is quick, and only their users need the extras."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from snell.extras import hint

#: Module and one line of help by command, under the heading of each section of the help.
Sections = Mapping[str, Mapping[str, tuple[str, str]]]


class LazyGroup(click.Group):
    """A group of the commands in ``sections``. Each is its module's ``main``, or as ``module:name`` says."""

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
        if module.startswith("snell.bench"):
            return importlib.import_module("snell.bench.commands").command(cmd_name, module)
        try:
            module, _, name = module.partition(":")
            command: click.Command = getattr(importlib.import_module(module), name or "main")
        except ImportError as error:
            self._ask_for_extra(error, ctx, cmd_name)
            raise
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ImportError as error:  # a command imports slow packages only when it runs
            self._ask_for_extra(error, ctx, ctx.invoked_subcommand or "")
            raise
        except OSError as error:
            if error.filename is None:
                raise
            # A folder that cannot be written or a full disk is not a fault of the program.
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error

    def _ask_for_extra(self, error: ImportError, ctx: click.Context, command: str) -> None:
        """Raise a sentence that says which extra to install, where a package is missing."""
        missing = _missing(error)
        if missing is not None:
            extra = "bench" if self.modules.get(command, "").startswith(("snell.bench", "snell.study")) else "cli"
            extra = "translate" if command == "translate" else extra
            raise click.ClickException(
                f"{ctx.command_path} {command} needs {missing}, which is not installed: {hint(extra)}"
            ) from error

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
