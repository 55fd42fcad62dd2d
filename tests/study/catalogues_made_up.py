"""Message catalogues of made-up languages: every word of English has another in each."""

import random
import struct

WORDS = ["save", "open", "close", "image", "layer", "brush", "colour", "file", "window", "print", "select", "copy"]


def write_mo(path, messages):
    """A catalogue as msgfmt writes it, without a hash table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    sides = [[text.encode() + b"\0" for text in side] for side in zip(*sorted(messages.items()), strict=True)]
    count, place = len(messages), 28 + 16 * len(messages)
    tables = b""
    for text in (*sides[0], *sides[1]):
        tables += struct.pack("<II", len(text) - 1, place)
        place += len(text)
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    path.write_bytes(header + tables + b"".join(sides[0] + sides[1]))


def translated(source, language):
    return " ".join(f"{word[::-1]}{language}" for word in source.split())


def make_catalogues(folder, languages, count=300):
    chance = random.Random(0)
    sources = [" ".join(chance.choices(WORDS, k=chance.randint(4, 7))) for _ in range(count)]
    for language in languages:
        messages = {source: translated(source, language) for source in sources}
        messages |= {
            "%d of %s (%i) {0}": "x x x x",
            "too short": "x",
            "the same as in English": "the same as in English",
        }
        messages |= {f"menu\4_{sources[0]} again": translated(f"{sources[0]} again", language)}
        write_mo(folder / language / "LC_MESSAGES" / "made-up.mo", messages)
    return folder
