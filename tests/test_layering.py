"""Imports go downwards, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from checkout import ROOT

#: From the top down. A module imports from rows below its own, and from its own package. Names in one row do not import
#: each other. A name stands for a module or for a whole package; ``snell.__init__`` is the package's own file.
LAYERS = (
    ("snell.__main__", "snell.bench"),
    ("snell.cli",),
    ("snell.__init__", "snell.peft", "snell.testing"),
    ("snell.linear",),
    ("snell.merging", "snell.distributed"),
    ("snell.functional",),
    ("snell.ops",),
    ("snell.competition",),
    ("snell.blocks",),
    ("snell.backends",),
    ("snell.native", "snell.kernels", "snell.initial"),
    ("snell.reference", "snell.update"),
    ("snell.spec",),
    ("snell.kernel_functions", "snell.precision", "snell.extras"),
)
DEPTHS = {name: depth for depth, row in enumerate(LAYERS) for name in row}
FOLDERS = {"snell": "snell", "snell.kernels": "kernels", "snell.bench": "bench"}

Graph = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of snell that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


def graph() -> Graph:
    known = modules()
    own = {"snell": "snell.__init__"}
    return {own.get(name, name): {own.get(n, n) for n in imported(path, known)} for name, path in known.items()}


def layer(module: str) -> str:
    """The name in LAYERS that a module falls under; empty if there is none."""
    while module and module not in DEPTHS:
        module = module.rpartition(".")[0]
    return module


def upward(graph: Graph) -> list[str]:
    """Imports that do not go down."""
    edges = ((a, b, layer(a), layer(b)) for a, found in graph.items() for b in found)
    return [f"{a} imports {b}" for a, b, above, below in edges if above != below and DEPTHS[above] >= DEPTHS[below]]


def test_every_module_has_its_layer() -> None:
    assert [module for module in graph() if not layer(module)] == []


def test_imports_go_down() -> None:
    found = graph()
    assert len(found["snell.linear"]) >= 3
    assert upward(found) == []


def test_no_imports_run_in_a_circle() -> None:
    TopologicalSorter(graph()).prepare()


def test_an_upward_import_and_a_circle_are_found() -> None:
    planted = {"snell.peft.snell.layer": {"snell.linear"}, "snell.linear": {"snell.spec"}, "snell.spec": {"snell.ops"}}
    assert upward(planted) == ["snell.spec imports snell.ops"]
    assert upward({"snell.peft": {"snell.testing.cases"}}) == ["snell.peft imports snell.testing.cases"]
    with pytest.raises(CycleError):
        TopologicalSorter({"snell.cli.a": {"snell.cli.b"}, "snell.cli.b": {"snell.cli.a"}}).prepare()
