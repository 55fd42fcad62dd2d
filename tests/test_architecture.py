"""The arrows between modules run one way: no import goes up a floor, and no circle of imports exists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from checkout import ROOT

#: Where each package lies in a checkout.
SOURCES = {"snell": ROOT / "snell", "snell.kernels": ROOT / "kernels", "snell.bench": ROOT / "bench"}

#: From the ground up. A module imports modules of lower floors, and of its own entry.
FLOORS = (
    ("snell.kernel_functions", "snell.extras"),
    ("snell.spec", "snell.precision", "snell.counter", "snell.waves"),
    ("snell.update", "snell.reference"),
    ("snell.native", "snell.kernels"),
    ("snell.backends",),
    ("snell.blocks",),
    ("snell.competition",),
    ("snell.dispatch",),
    ("snell.ops", "snell.red", "snell.softmax"),
    ("snell.functional",),
    ("snell.initial", "snell.merging", "snell.distributed"),
    ("snell.linear",),
    ("snell",),
    ("snell.peft", "snell.testing"),
    ("snell.training",),
    ("snell.cli",),
    ("snell.bench",),
    ("snell.study",),
    ("snell.__main__",),
)


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules of this project that the code imports, in functions too, but not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        yield from (name for name in names if name in MODULES)
        yield from _imports(node)


GRAPH = {name: set(_imports(ast.parse(path.read_text()))) - {name} for name, path in MODULES.items()}


def _entry(module: str) -> tuple[int, str]:
    """The floor, and its entry, that the module belongs to: the longest that it is, or lies in."""
    entries = [(floor, entry) for floor, names in enumerate(FLOORS) for entry in names]
    inside = [
        pair for pair in entries if pair[1] == module or (pair[1] != "snell" and module.startswith(pair[1] + "."))
    ]
    assert inside, f"{module} is on no floor: give it one in FLOORS"
    return max(inside, key=lambda pair: len(pair[1]))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_up(module: str) -> None:
    floor, entry = _entry(module)
    wrong = [name for name in GRAPH[module] if _entry(name)[1] != entry and _entry(name)[0] >= floor]
    assert not wrong, f"{module} imports {', '.join(wrong)}, which is not below it"


def test_there_is_no_circle() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_command_line_and_the_tuner_use_no_benchmark() -> None:
    lazily = {"snell.cli", "snell.cli.lazy"}  # which name modules to import when a command runs
    users = [name for name in MODULES if name.startswith(("snell.cli", "snell.peft", "snell.testing"))]
    assert not [name for name in users if name not in lazily and any(i.startswith("snell.bench") for i in GRAPH[name])]


def test_files_are_short() -> None:
    limits = {"snell": 300, "kernels": 300, "csrc": 300, "bench": 300, "tests": 450}
    long = [
        f"{path.relative_to(ROOT)}: {count}"
        for folder, limit in limits.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and (count := len(path.read_text().splitlines())) > limit
    ]
    assert not long, f"files to split: {long}"


#: The public interface defines these signatures twice: checked functions and their reference; a layer's settings.
REPEATED = {"merge", "snell_linear", "__init__", "from_linear"}


def test_no_long_signature_is_repeated() -> None:
    seen: dict[tuple[str, ...], list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = (arg.arg for arg in (*node.args.args, *node.args.kwonlyargs))
                names = tuple(name for name in names if name not in ("self", "cls"))
                if len(names) > 6 and node.name not in REPEATED:
                    seen.setdefault(names, []).append(f"{module}.{node.name}")
    assert not [where for where in seen.values() if len(where) > 1]


def test_one_class_is_called_update() -> None:
    classes = [
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "Update"
    ]
    assert classes == ["snell.update"]
