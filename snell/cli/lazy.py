"""A group whose commands are imported when they run, so that help is quick and an extra is asked for by its user."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """Commands named in ``modules`` as (module, help); each module's ``main`` is the command."""

    def __init__(self, *args: Any, modules: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.modules, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.modules:
            return super().get_command(ctx, cmd_name)
        module = self.modules[cmd_name][0]
        try:
            command: click.Command = importlib.import_module(module).main
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("snell"):
                raise
            raise click.ClickException(
                f"snell {cmd_name} needs {error.name}, which is not installed: pip install 'snell[bench]'"
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        eager = [(name, super(LazyGroup, self).get_command(ctx, name)) for name in super().list_commands(ctx)]
        rows = [(name, text) for name, (_, text) in self.modules.items()]
        rows += [(name, command.get_short_help_str()) for name, command in eager if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
