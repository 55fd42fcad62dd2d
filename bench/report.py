"""What every benchmark does with its figures: a results file, Markdown tables, pictures."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from snell.bench.names import METHODS
from snell.cli.machine import machine_facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]
#: What a table's cell shows of a row: a template of fields, or a function. A column is a heading and a cell.
Cell = str | Callable[[Any], str]
Columns = list[tuple[str, Cell]]

# Results files.


def command_line(program: str) -> str:
    """The command that is running, as a reader would type it, without where data and results lie and its time limit."""
    context = click.get_current_context(silent=True)
    words = program.split()
    for parameter in context.command.params if context else []:
        source = context.get_parameter_source(parameter.name)
        if parameter.name not in ("out", "data", "max_minutes") and source is ParameterSource.COMMANDLINE:
            value = context.params[parameter.name]
            name = [] if isinstance(parameter, click.Argument) else parameter.opts[:1]
            for one in value if parameter.multiple else [value]:
                flag = () if one is True else (one,)
                words += [*name, *map(str, one if isinstance(one, tuple) else flag)]
    return shlex.join(words)


def publish(
    out: Path, benchmark: str, module: Any, document: dict[str, Any], device: str = "cpu", program: str = ""
) -> Document:
    """Write the command, the machine and the document to ``out``; print the module's report and draw its picture.

    The file is ``NAME.json`` with the document's ``file`` for its name, or the benchmark's. Returns what was written.
    """
    path = out / f"{document.pop('file', benchmark)}.json"
    written = {
        "command": command_line(program or f"snell bench {benchmark}"),
        "machine": machine_facts(device),
        **document,
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=1) + "\n")
    click.echo(f"{module.report(written)}\n\nwritten: {path}")
    if hasattr(module, "draw"):
        module.draw(path.with_suffix(".png"), written)
    return written


def made_by(document: Document) -> str:
    """How a results file was made, as one line of Markdown."""
    machine = document["machine"]
    settings = ", ".join(f"{name} {value}" for name, value in document.get("settings", {}).items())
    where = f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"`{document['command']}`{': ' if settings else ''}{settings}; {where}."


# Tables.


def size(count: float) -> str:
    """Bytes for a reader."""
    if count < 2**10:
        return f"{count:.0f} B"
    return f"{count / 2**10:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def standard_error(values: Sequence[float]) -> float:
    """Sample standard deviation of the values' mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def with_error(values: Sequence[float], sign: str = "") -> str:
    """Mean and its standard error."""
    return f"{statistics.fmean(values):{sign}.1f} ± {standard_error(values):.1f}"


#: Formats of a template beside Python's own.
FORMATS: dict[str, Callable[[Any], str]] = {
    "s": lambda seconds: f"{seconds:.3g} s",
    "ms": lambda seconds: f"{seconds * 1e3:.3g} ms",
    "size": size,
    "error": with_error,
}


class _Template(string.Formatter):
    """``{methods[lora][seconds]:ms}``; a dash where a row has no such field, or None in it."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except (KeyError, TypeError):
            return None, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "-"
        if format_spec in FORMATS and not isinstance(value, str):
            return FORMATS[format_spec](value)
        return str(super().format_field(value, format_spec))


def fill(cell: Cell, row: Any) -> str:
    """What the cell shows of the row."""
    return _Template().vformat(cell, (), row) if isinstance(cell, str) else cell(row)


def raised(cell: Cell) -> Cell:
    """The cell for one method's figures, or the word that it raised an error."""
    return lambda entry: "**raises**" if "error" in entry else fill(cell, entry)


def table(columns: Iterable[tuple[str, Cell]], rows: Iterable[Any]) -> str:
    """A Markdown table: a heading and a cell for each column."""
    headings, cells = zip(*columns, strict=True)
    lines = [headings, ["---"] * len(headings), *([fill(cell, row) for cell in cells] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of text."""
    return table([(heading, lambda row, i=i: row[i]) for i, heading in enumerate(headings)], rows)


def report(document: Document) -> str:
    """Markdown of a results file that holds its tables as they are: ``columns`` and ``rows`` of text."""
    tables = [plain_table(one["columns"], one["rows"]) for one in document["tables"]]
    return "\n\n".join([*tables, made_by(document)])


# Pictures.


@dataclass
class Series:
    """Figures over places: a line, dots (``look`` in matplotlib's words), or bars from ``bottom`` up.

    Attributes:
        y: None where a method raised an error, which is written in its place.  x: 0, 1, ... unless given.
        error: half the length of each error bar.  band: the edges of a shaded band.  bars: the width of bars.
    """

    y: Sequence[float | None]
    x: Sequence[float] | None = None
    label: str | None = None
    colour: str = "black"
    look: str = "-"
    error: Sequence[float] | None = None
    band: tuple[Sequence[float], Sequence[float]] | None = None
    bars: float | None = None
    bottom: Sequence[float] | float = 0.0
    style: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, axes: Axes) -> None:
        x, y = self.x or range(len(self.y)), [math.nan if value is None else value for value in self.y]
        style = {"color": self.colour, "label": self.label, **self.style}
        if self.bars:
            axes.bar(x, y, self.bars, self.bottom, yerr=self.error, capsize=3, **style)
        elif self.error:
            axes.errorbar(x, y, self.error, fmt=self.look, capsize=3, **style)
        else:
            axes.plot(x, y, self.look, **style)
        if self.band:
            axes.fill_between(x, *self.band, color=self.colour, alpha=0.15, linewidth=0)
        for place in (place for place, value in zip(x, self.y, strict=True) if value is None):
            where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text(place, 0.02, "raises", rotation=90, fontsize=7, color=self.colour, **where)


@dataclass
class Panel:
    """One diagram. ``log`` names its logarithmic axes, ``ticks`` the places along x, ``level`` is a line across."""

    title: str
    series: Sequence[Series]
    xlabel: str = ""
    ylabel: str = ""
    log: str = ""
    ticks: Mapping[float, str] | None = None
    ylim: tuple[float | None, float | None] = (None, None)
    level: float | None = None
    legend: Mapping[str, Any] | None = None

    def draw(self, axes: Axes) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set(**{f"{name}scale": "log" for name in self.log})
        for series in self.series:
            series.draw(axes)
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel, ylim=self.ylim)
        for name in self.log:
            axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e5 * low else (1,)))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())
        if self.level is not None:
            axes.axhline(self.level, color="black", linewidth=0.8)
        if self.ticks:
            axes.set_xticks(list(self.ticks), list(self.ticks.values()), fontsize=9)
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(self.title, loc="left", fontsize=11)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if self.legend is not None:
            axes.legend(**{"fontsize": 9, "frameon": False, **self.legend})


def picture(path: Path, title: str, panels: Sequence[Sequence[Any]], width: float = 6.5, height: float = 4.5) -> None:
    """Rows of panels (or functions of axes) of that size in inches. The first without a legend shares one with all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(panels[0]), height * len(panels)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    grid = figure.subplots(len(panels), len(panels[0]), squeeze=False).flat
    for panel, axes in zip((panel for row in panels for panel in row), grid, strict=True):
        panel.draw(axes) if isinstance(panel, Panel) else panel(axes)
    handles, labels = grid[0].get_legend_handles_labels()
    if handles and grid[0].get_legend() is None:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)


def dots(groups: Sequence[Mapping[str, Any]], figure: Callable[[Any], float | None]) -> list[Series]:
    """A dot for each method in each group, side by side; a group holds each method's entry by its name."""
    methods = [name for name in METHODS if name in groups[0]]
    series = []
    for index, method in enumerate(methods):
        x = [group + (index - (len(methods) - 1) / 2) * min(0.13, 0.9 / len(methods)) for group in range(len(groups))]
        y = [None if "error" in group[method] else figure(group[method]) for group in groups]
        series.append(Series(y, x, *METHODS[method], "o"))
    return series
