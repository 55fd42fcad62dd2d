"""Translations from gettext's message catalogues, or from text files, divided by their English source."""

from __future__ import annotations

import gettext
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

#: Where packages install catalogues, as LANGUAGE/LC_MESSAGES/NAME.mo.
LOCALES = Path("/usr/share/locale")
#: Words of a source; a translation may have up to twice the most.
FEWEST_WORDS, MOST_WORDS = 4, 30
#: Shares of the sources, in percent: the rest is for training.
VALIDATION, TEST = 8, 8

# Of a format: printf's, Qt's, Python's and XML's placeholders.
_PLACEHOLDER = re.compile(r"%(?:\([^)]*\)|\d+\$)?[-#0 +]*[\d.]*[a-zA-Z]|%\d+|\{[^{}]*\}|<[^<>]*>|&\w+;")
_WORD = re.compile(r"[^\W\d_]{2,}")
# A letter's accelerator, marked by GTK or by Qt.
_ACCELERATOR = re.compile(r"[_&](?=\w)")


@dataclass(frozen=True)
class Sentences:
    """Sources and their translations, side by side: both ``[N]``."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)


def part_of(source: str) -> str:
    """``"train"``, ``"validation"`` or ``"test"``: settled by the source's words alone, whatever the language.

    Sources that differ by case, digits, punctuation or placeholders fall in the same part.
    """
    words = " ".join(_WORD.findall(_PLACEHOLDER.sub(" ", source))).casefold()
    place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big") % 100
    return "test" if place < TEST else "validation" if place < TEST + VALIDATION else "train"


def divided(pairs: Mapping[str, str]) -> dict[str, Sentences]:
    """Sentences of each part, in the order of their sources."""
    found: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for source, target in sorted(pairs.items()):
        found[part_of(source)].append((source, target))
    return {
        part: Sentences(*map(tuple, zip(*rows, strict=True))) if rows else Sentences((), ())
        for part, rows in found.items()
    }


def cleaned(text: str) -> str:
    """One line, without accelerators' marks."""
    return " ".join(_ACCELERATOR.sub("", text).split())


def _fit(source: str, target: str) -> bool:
    words, others = source.split(), target.split()
    # A format alone has hardly a word; an untranslated string teaches copying.
    speaks = len(_WORD.findall(_PLACEHOLDER.sub(" ", source))) >= FEWEST_WORDS
    return (
        FEWEST_WORDS <= len(words) <= MOST_WORDS and 1 <= len(others) <= 2 * MOST_WORDS and speaks and source != target
    )


def _messages(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        try:
            catalogue = gettext.GNUTranslations(file)
        except (OSError, UnicodeDecodeError, ValueError, IndexError):
            return  # damaged, or in a plural form or encoding that Python does not read
    for key, target in catalogue._catalog.items():  # type: ignore[attr-defined]  # nothing public lists the messages
        if isinstance(key, str) and key:
            yield key.rpartition("\4")[2], target  # after its context


def catalogues(folder: Path, languages: list[str]) -> dict[str, dict[str, Sentences]]:
    """Translations of each language by part.

    Args:
        folder: holds ``LANGUAGE/LC_MESSAGES/*.mo`` at any depth.

    Raises:
        click.ClickException: a language has no catalogue there.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(folder.rglob("LC_MESSAGES/*.mo")):
        language = path.parent.parent.name
        if language in languages:
            for message in _messages(path):
                source, target = map(cleaned, message)
                if _fit(source, target):
                    found[language].setdefault(source, target)
    if missing := [language for language in languages if language not in found]:
        raise click.ClickException(
            f"{folder} has no message catalogue of {', '.join(missing)}: install packages with translations, such as "
            "Debian's gimp-data and krita-l10n, or name another folder by --catalogues"
        )
    return {language: divided(found[language]) for language in languages}


def text_files(folder: Path) -> dict[str, Sentences]:
    """Translations by part from ``source.txt`` and ``target.txt``, which agree line by line."""
    lines = [(folder / name).read_text(encoding="utf-8").splitlines() for name in ("source.txt", "target.txt")]
    if len(lines[0]) != len(lines[1]):
        raise click.ClickException(
            f"{folder}: source.txt and target.txt must have as many lines; got {len(lines[0])} and {len(lines[1])}"
        )
    pairs: dict[str, str] = {}
    for source, target in zip(*lines, strict=True):
        if source.strip() and target.strip():
            pairs.setdefault(source.strip(), target.strip())
    return divided(pairs)
