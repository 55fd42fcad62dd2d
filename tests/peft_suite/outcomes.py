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
        unlisted: those that nothing allows, and what SNELL said.
        idle: patterns of differences.py that no failing test needs.
    """

    lora: Counter[str] = field(default_factory=Counter)
    snell: Counter[str] = field(default_factory=Counter)
    listed: Counter[str] = field(default_factory=Counter)
    unlisted: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, report: dict[str, dict[str, str]]) -> Comparison:
        """Compare twins; ``report`` holds each test's ``outcome``, and the ``reason`` where it did not pass."""
        found = cls()
        lora = {plain(name): entry["outcome"] for name, entry in report.items() if "LoRA:" in name}
        found.lora.update(lora.values())
        worse = []
        for name, entry in report.items():
            if "SNELL:" not in name:
                continue
            found.snell[entry["outcome"]] += 1
            if entry["outcome"] != "passed" and lora.get(plain(name)) == "passed":
                worse.append(plain(name))
                if (allowed := reason(plain(name))) is None:
                    found.unlisted[plain(name)] = entry["reason"]
                else:
                    found.listed[allowed] += 1
        found.idle = [pattern for pattern in FAILS if not any(re.search(pattern, name) for name in worse)]
        return found

    def __str__(self) -> str:
        lines = [
            f"{name}: {dict(sorted(counts.items()))}" for name, counts in (("LoRA", self.lora), ("SNELL", self.snell))
        ]
        lines += [f"fails for SNELL alone, {count}: {why}" for why, count in self.listed.most_common()]
        lines += [f"NOT LISTED {name}: {why}" for name, why in self.unlisted.items()]
        return "\n".join(lines)
