"""The self-check: every operation of every backend on small cases, compared with the float64 reference."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from snell import backends, competition
from snell.testing.cases import OPERATIONS, Case, Setting, settings


@dataclass
class Checked:
    """One operation of one backend over all cases.

    Attributes:
        backend, device, operation: what was checked, and where its tensors were.
        cases: how many settings.
        largest_error: as a share of its bound, over all entries of all results; above 1 is wrong.
        worst: the setting it was found in.
        failures: settings that gave a wrong result, or what they raised.
    """

    backend: str
    device: str
    operation: str
    cases: int = 0
    largest_error: float = 0.0
    worst: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def verdict(self) -> str:
        """What is wrong, as a sentence without its period."""
        first = "; ".join(self.failures[:2])
        return (
            f"{len(self.failures)} of {self.cases} cases are wrong: {first}{'; ...' if len(self.failures) > 2 else ''}"
        )

    def add(self, setting: Setting, case: Case, check: Callable[[Case], float | None]) -> None:
        """Run the check on one case and record the result, if the backend has the operation."""
        try:
            share = check(case)
        except Exception as error:  # a broken installation may raise anything
            self.fails(setting, error)
            return
        if share is None:
            return
        self._take(setting, share)
        if not share <= 1:
            off = "wrong entries" if share == math.inf else f"{share:.3g} x its bound off"
            self.failures.append(f"{setting}: {off}")

    def fails(self, setting: Setting, error: Exception) -> None:
        """A case that raised."""
        self._take(setting, math.inf)
        self.failures.append(f"{setting}: raises {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")

    def _take(self, setting: Setting, share: float) -> None:
        self.cases += 1
        if share > self.largest_error or not self.worst:
            self.largest_error, self.worst = share, str(setting)


def places() -> Iterator[tuple[str, str, bool]]:
    """Each backend with the device type of its tensors, and whether it is too slow for all settings."""
    for name in backends.AVAILABLE:
        if name != "triton":
            yield name, "cpu", False
        else:  # compiles for each setting, or is interpreted
            yield name, "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda", True


def check(backend: str, device: str, thinned: bool, on_case: Callable[[], Any] = lambda: None) -> list[Checked]:
    """Check all operations of one backend. ``on_case`` is called after each setting."""
    found: dict[str, Checked] = {}

    def entry(operation: str) -> Checked:
        return found.setdefault(operation, Checked(backend, device, operation))

    with backends.use(backend, device):
        for setting in settings(thinned):
            competition.forget()  # a threshold that another backend selected does not count
            try:
                case = Case(setting, device)
            except Exception as error:
                entry("select").fails(setting, error)
                continue
            for operation, measure in OPERATIONS.items():
                entry(operation).add(setting, case, measure)
            on_case()
    competition.forget()
    return [one for one in found.values() if one.cases]
