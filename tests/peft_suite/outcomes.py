"""What came of the tests: LoRA's outcomes beside SNELL's."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from .differences import FAILS, reason


def plain(name: str) -> str:
    """A test's name without the tuner's: the same for twins."""
    return re.sub("SNELL:|LoRA:", "", name)


@dataclass
class Comparison:
    """Counts of outcomes, and what must not be.

    Attributes:
        lora, snell: how many tests ``passed``, ``failed`` and were ``skipped``.
        listed: how many pass with LoRA and fail with SNELL, by the reason that allows it.
        unlisted: those that nothing allows: name, and what was raised.
        both: those that fail with both: what they need is not here.
        idle: patterns of differences.py that no failing test needs.
    """

    lora: Counter[str] = field(default_factory=Counter)
    snell: Counter[str] = field(default_factory=Counter)
    listed: Counter[str] = field(default_factory=Counter)
    unlisted: list[str] = field(default_factory=list)
    both: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, report: dict[str, dict[str, str]]) -> Comparison:
        """Compare twins; ``report`` holds each test's ``outcome``, and the ``reason`` where it did not pass."""
        found = cls()
        lora = {plain(name): entry["outcome"] for name, entry in report.items() if "LoRA:" in name}
        found.lora.update(lora.values())
        failures = []
        for name, entry in report.items():
            if "SNELL:" not in name:
                continue
            came, twin = entry["outcome"], plain(name)
            found.snell[came] += 1
            if came == lora.get(twin) == "failed":
                found.both.append(twin)
            elif came != "passed" and lora.get(twin) == "passed":
                failures.append(f"{twin}: {entry['reason']}")
                if (allowed := reason(failures[-1])) is None:
                    found.unlisted.append(failures[-1])
                else:
                    found.listed[allowed] += 1
        found.idle = [p for p in FAILS if not any(re.search(p, failure, re.DOTALL) for failure in failures)]
        return found

    def __str__(self) -> str:
        lines = [
            f"{name}: {dict(sorted(counts.items()))}" for name, counts in (("LoRA", self.lora), ("SNELL", self.snell))
        ]
        lines += [f"fails for SNELL alone, {count}: {why}" for why, count in self.listed.most_common()]
        lines += [f"fails with both: {name}" for name in self.both]
        lines += [f"NOT LISTED {failure}" for failure in self.unlisted]
        return "\n".join(lines)
