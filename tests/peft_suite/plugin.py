"""The pytest plugin that runs PEFT's test files with LoRA's rows and their SNELL twins, and no others.

Loaded by ``-p peft_suite.plugin`` in a process of its own: it replaces ``pytest.mark.parametrize``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from . import twins
from .outcomes import plain

_ORIGINAL = pytest.mark.parametrize
_OUTCOMES: dict[str, dict[str, str]] = {}


def _parametrize(argnames: Any, argvalues: Any, *args: Any, **kwargs: Any) -> Any:
    values = list(argvalues)
    if twins.has_tuner(values):
        return _ORIGINAL(argnames, list(twins.rows(values)))
    return _ORIGINAL(argnames, values, *args, **kwargs)


class _Everything(dict):
    """PEFT's record of models that are cached: all of them are."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


class _Absent:
    """What a package that is not installed would give."""


def _stub(name: str, **members: Any) -> None:
    """A module that PEFT's tests import for cases that are not run here."""
    if importlib.util.find_spec(name) is None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        sys.modules[name] = module


def pytest_configure(config: pytest.Config) -> None:
    # Classes, as they are asked for by isinstance.
    _stub("datasets", load_dataset=None, Dataset=_Absent, IterableDataset=_Absent)
    _stub("diffusers", StableDiffusionPipeline=_Absent)
    pytest.mark.parametrize = _parametrize  # type: ignore[method-assign]
    importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = _Everything()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, shares = map(int, os.environ.get("PEFT_SUITE_SHARE", "0/1").split("/"))
    tests = [item for item in items if "LoRA:" in item.nodeid or "SNELL:" in item.nodeid]
    names = sorted({plain(item.nodeid) for item in tests})
    chosen = set(names[share::shares])
    kept = [item for item in tests if plain(item.nodeid) in chosen]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else report.longreprtext
        if report.nodeid not in _OUTCOMES or report.failed:
            _OUTCOMES[report.nodeid] = {"outcome": report.outcome, "reason": why}


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["PEFT_SUITE_REPORT"]).write_text(json.dumps(_OUTCOMES))
