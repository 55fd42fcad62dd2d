"""The command line in a process of its own, with what the test takes away from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_HIDE = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] == {hidden!r} else find(name, path, target)
)
sys.argv = ["snell", *{arguments!r}]
from snell.__main__ import main
main()
"""


def run(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it; snell is the one in ``folder``, where one is given."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def without(hidden: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``snell arguments`` where the package ``hidden`` is not installed."""
    return run([sys.executable, "-c", _HIDE.format(hidden=hidden, arguments=arguments)])
