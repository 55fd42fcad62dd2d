"""The journal of a study: a line for each run, written as it ends, so that a stopped study goes on from there."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import click


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


class Journal:
    """Results of runs by what was run. One process at a time has the file open.

    Raises:
        click.ClickException: another process has it, or a line in its midst is no JSON.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise click.ClickException(f"another study is writing {path}: name another folder by --out") from error
        self._results = self._read(path)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        results, whole = {}, 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith("\n"):
                break  # a kill cut it short: the run is done again
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise click.ClickException(f"{path}, line {number}: no JSON ({error})") from error
            results[_name(entry["run"])] = entry["result"]
            whole += len(line.encode())
        self._file.truncate(whole)
        return results

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of the run, None where it is not done."""
        return self._results.get(_name(key))

    def add(self, key: Mapping[str, Any], result: dict[str, Any]) -> None:
        """Append the result."""
        self._results[_name(key)] = result
        self._file.write(json.dumps({"run": key, "result": result}) + "\n")
        self._file.flush()
